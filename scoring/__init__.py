"""How good a written page is: it is rendered, compared with its reference, measured, and shown.

Rooms from top to bottom; each may import those below it, and none above:

    many_pages       pairs out of folders, scored in order, kept on disk on the way, shown in one report
    scorers          pairs of pages scored by processes of their own, beside whatever this one does
    report           one file that shows every page, what was wanted and what was written
    report_summary   its numbers over many pages, and its curves
    report_pictures  its pictures, their boxes, where two differ
    report_values    what it shows of a page, and how values read
    proof            the scorer proves itself on pages whose scores are known, before every run
    statistics       means, shares, and whether two runs over the same pages differ
    metrics          what is measured of two pages
    clip             how alike they are besides their texts, where CLIP's weights are at hand
    matching         which block of one stands for which of the other
    blocks           where each text of a page stands and in which colour
    validity         whether a page is whole, repeats itself, equals another
    generated        texts that CSS generates, as the browser has laid them out
    renders          draws hostile pages in Chromium, safely; of ours it needs the clock and use_model_from_hub.py alone
    clock            how long a page has taken by its own work
    machine          how many browsers this machine bears
    bar              how far a long piece of work has come

Everything here is started as a module (`python -m scoring.renders`): started as a file, this folder would come first on
Python's path, and `statistics` would hide Python's own.
"""
