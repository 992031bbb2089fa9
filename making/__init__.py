"""The rooms of make_pages.py: a page's way from its source to a screenshot and the HTML that shows it.

pushing         the push of a dataset to the Hub, as parquet files, with dataset_card.md
folder          the dataset on disk, and what became of each page that was asked for
workers         processes that make pages, each with a browser
one_page        a page's target and screenshot: rendered, tried
trials          whether a candidate looks like the page, whatever flickers there
reductions      what of a page can go, and the page without it
sources         which pages there are, and their text
local_files     what a page asks for, brought into it
decoding        bytes as text, as browsers read them
style_sheets    CSS, read, greyed, shortened and written
browser_steps   what only a browser can do; the .js files beside it do it
page_settings   what decides how a page comes out
drops           why a page was left out

Each imports only what stands below it.
"""
