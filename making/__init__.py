"""The rooms of make_pages.py: a page's way from its source to a screenshot and the HTML that shows it.

style_sheets reads, greys and shortens CSS.
"""
