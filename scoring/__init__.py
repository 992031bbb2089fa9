"""The rooms of page_scores.py: pages are rendered, compared, and shown.

renders draws hostile pages in Chromium, safely; report shows every page, what was wanted and what was written.
"""
