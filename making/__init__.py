"""The rooms of make_pages.py: a page's way from its source to a screenshot and the HTML that shows it.

folder          the dataset on disk, and what became of each page that was asked for
one_page        a page's target and screenshot: rendered, tried
trials          whether a candidate looks like the page, whatever flickers there
reductions      what of a page can go, and the page without it
browser_steps   what only a browser can do; the .js files beside it do it
sources         which pages there are, and their text
local_files     what a page asks for, brought into it
style_sheets    CSS, read, greyed, shortened and written
page_settings   what decides how a page comes out
drops           why a page was left out

Each imports only what stands below it.
"""
