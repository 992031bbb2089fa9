"""A site of five pages for make_pages.py: a usual one, two that are too long, two with nothing to see."""

from pathlib import Path

from PIL import Image

SITE_CSS = """
@import url("more.css");
body{margin:0;font:16px/1.5 "DejaVu Sans",sans-serif;--used:#036;--unused:#f00}
h1{color:var(--used)} .nothing{color:red} .card:hover{color:red} .card{padding:8px;background:#eee}
@media print{h1{display:none}} @media (min-width:600px){h1{font-size:40px}} @media (max-width:599px){h1{font-size:20px}}
@font-face{font-family:x;src:url(x.woff)} @keyframes spin{to{opacity:0}}
.icon{display:inline-block;width:24px;height:24px;background:url(dot.png) no-repeat} li + li{color:#800}
"""
SITE_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="description" content="secret words"><title>Site</title>
<link rel="stylesheet" href="css/site.css"><link rel="icon" href="x.ico"><script src="late.js" defer></script></head>
<body onload="go()"><!-- a comment --><h1 data-k="v" aria-label="w">Heading</h1>
<img src="css/dot.png" alt="a dot"><img src="https://far.example/x.jpg" width="90" height="40"><b class="icon"></b>
<div style="display:none">never seen</div><input type="hidden" value="token">
<div class="card unnamed"><a href="https://far.example/long/path">A link</a></div>
<ul><li>one</li><li style="display:none">hidden</li><li>two</li></ul>
<noscript>no scripts here</noscript><script>document.write("<p>written by a script</p>")</script>
</body></html>"""


def write_site(folder: Path) -> Path:
    (folder / "css").mkdir()
    (folder / "css" / "site.css").write_text(SITE_CSS)
    (folder / "css" / "more.css").write_text("h1{letter-spacing:2px}")
    (folder / "late.js").write_text("document.querySelector('h1').textContent += ' and more'")
    Image.new("RGB", (30, 20), "red").save(folder / "css" / "dot.png")
    (folder / "index.html").write_text(SITE_PAGE)
    rows = "".join(f"<p>Paragraph {number} of a long page</p>" for number in range(200))
    (folder / "long.html").write_text(f"<html><body><div>{rows}</div><footer>The end</footer></body></html>")
    (folder / "pre.html").write_text(f"<!DOCTYPE html><pre>{''.join(f'line {n}{chr(10)}' for n in range(400))}</pre>")
    (folder / "blank.html").write_text('<!DOCTYPE html><p style="color:white">white on white</p>')
    (folder / "bare.html").write_text("<!DOCTYPE html><hr><hr>")
    return folder
