"""The rooms of make_pages.py: a page's way from its source to a screenshot and the HTML that shows it.

browser_steps and its .js files do what only a browser can; style_sheets reads, greys and shortens CSS.
"""
