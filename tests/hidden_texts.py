"""Ways in which pages hold text that nobody sees: `ghost` is never seen, all other text is.

page(["closed details", "text in the colour of the page"])        # a document with those, one below the other
"""

from collections.abc import Iterable

GHOST = "ghost words ghost of a ghost"
LINES = "".join(f"<p>line {n}</p>" if n < 3 else f"<p>ghost {n}</p>" for n in range(40))
ROWS = "\n".join(f"line {n}" if n < 3 else f"ghost {n}" for n in range(60))
CODE = "\n".join(f"line {n} of code that goes on for a while {GHOST}" for n in range(3))
OPTIONS = "".join(f"<option value={n}>ghost {n}</option>" for n in range(90))
SR_ONLY = "position:absolute;width:1px;height:1px;margin:-1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap"

KINDS = {
    "closed details": f"<details><summary>sum</summary>{GHOST}<p>{GHOST}</p><ul><li>{GHOST}</ul></details>",
    "below the fold of a scroll box": f"<div style='height:115px;overflow:auto;border:1px solid'>{LINES}</div>",
    "under a sticky head": "<div style='height:125px;overflow:auto'><div style='position:sticky;top:0;height:20px;"
    f"background:#fff'>head</div>{LINES}</div>",
    "right of the fold": "<div style='width:90px;overflow-x:auto;white-space:nowrap;border:1px solid'><b>here "
    "and on</b> "
    f"<i>and further</i> <u>{GHOST}</u></div>",
    "code wider than its box": f"<pre style='width:200px;overflow:auto'>{CODE}</pre>",
    "code longer than its box": f"<pre style='height:46px;overflow:auto'>{ROWS}</pre>",
    "closed accordion": f"<div style='max-height:0;overflow:hidden'><p>{GHOST}</p></div>",
    "indented out of a button": f"<button style='text-indent:-9999px;background:red'>{GHOST}</button>",
    "indented out of a link": "<a href=# style='display:inline-block;width:90px;height:40px;background:blue;"
    f"text-indent:-9999px;overflow:hidden'>{GHOST}</a>",
    "faded out": f"<p style='opacity:0'>{GHOST}</p><div style='opacity:0'><h2>{GHOST}</h2><p>{GHOST}</p></div>",
    "transparent in a sentence": f"<p>one <span style='color:transparent'>{GHOST}</span> two</p>",
    "transparent block": f"<div style='color:rgba(0,0,0,0)'>{GHOST * 9}</div>",
    "in the colour of the page": f"<font color=white>{GHOST}</font> <p style='color:#fff'>{GHOST} <b>x</b></p>",
    "covered": f"<div style='position:relative;height:60px'>{GHOST}<br>{GHOST}<div style='position:absolute;inset:0;"
    "background:#fff'>a lid with words on it</div></div>",
    "behind": "<div style='position:relative;z-index:0'><p style='position:absolute;z-index:-1;margin:0'>ghost</p>"
    "<p style='background:#ddd;margin:0'>in front of it</p></div>",
    "hidden": f"<p style='visibility:hidden'>{GHOST}</p><p>one <b style='visibility:hidden'>{GHOST}</b> two</p>",
    "of no size": f"<div style='font-size:0'>{GHOST}<span style='font-size:16px'>big</span></div>",
    "left of the page": f"<p style='position:absolute;left:-9999px'>{GHOST}</p>",
    "right of the page": f"<div style='position:fixed;right:-300px;width:300px;top:0'>{GHOST}</div>",
    "for screen readers": f"<button>press<span style='{SR_ONLY}'>{GHOST}</span></button>",
    "clipped by a rectangle": f"<p style='position:absolute;clip:rect(0,0,0,0)'>{GHOST}</p>",
    "clipped by a path": f"<p style='clip-path:inset(100%)'>{GHOST}</p>",
    "options of a closed select": f"<select><optgroup label=x>{OPTIONS}<option selected>mine</optgroup></select>",
    "options of a select of fixed width": f"<select style='width:99px'><option>first</option>{OPTIONS}</select>",
    "options below the fold of a list box": f"<select size=3><option>a<option>b<option>c{OPTIONS}</select>",
    "options of a datalist": f"<input list=d value=typed><datalist id=d>{OPTIONS}</datalist>",
    "textarea": f"<textarea rows=3 style='padding-bottom:0;padding-top:3px'>{ROWS}</textarea>",
    "slides": "<div style='width:300px;overflow:hidden'><div style='display:flex;transform:translateX(-300px)'>"
    + "".join(f"<div style='flex:0 0 300px'>{text}</div>" for text in (GHOST, "slide", GHOST, GHOST))
    + "</div></div>",
    "drawer": "<nav style='position:fixed;left:0;top:0;width:300px;height:100%;transform:translateX(-100%);"
    f"background:#eee'>{GHOST}</nav>",
    "titles of a drawing": f"<svg width=20 "
    f"height=20><title>{GHOST}</title><desc>{GHOST}</desc><g><title>{GHOST}</title>"
    "<circle r=9 cx=9 cy=9 /></g></svg>",
    "in a drawing": f"<svg width=90 height=20><text y=15>drawn</text><text y=900>{GHOST}</text><defs><text>{GHOST}"
    f"</text></defs><text display=none>{GHOST}</text><text y=15 opacity=0>{GHOST}</text></svg>",
    "for browsers without": f"<progress value=.3>{GHOST}</progress><meter value=.3>{GHOST}</meter><canvas width=9 "
    f"height=9>{GHOST}</canvas><audio controls>{GHOST}</audio><video width=9 height=9>{GHOST}</video>",
    "not open": f"<p hidden>{GHOST}</p><p hidden=until-found>{GHOST}</p><dialog>{GHOST}</dialog><i popover>{GHOST}</i>",
    "caption and legend": f"<table border=1><caption style='{SR_ONLY}'>{GHOST}</caption><tr><td>cell</table>"
    f"<fieldset><legend style='visibility:hidden'>{GHOST}</legend>field</fieldset>",
    "between striped rows": "<style>.s li:nth-child(even){background:#eee}</style><ul class=s>"
    + "".join(f"<li>row {n}</li><li style='display:none'>ghost {n}</li>" for n in range(4))
    + "</ul>",
    "filtered and masked": f"<p style='filter:opacity(0)'>{GHOST}</p><p "
    "style='mask-image:linear-gradient(transparent,"
    f"transparent)'>{GHOST}</p>",
    "turned away": f"<p style='transform:scale(0)'>{GHOST}</p><p style='transform:rotateY(180deg);"
    "backface-visibility:"
    f"hidden'>{GHOST}</p>",
    "other tabs": "<div style='position:relative;height:30px'><div style='position:absolute'>tab</div><div style='"
    f"position:absolute;opacity:0'>{GHOST}</div><div style='position:absolute;visibility:hidden'>{GHOST}</div></div>",
    "without its content": f"<div style='content-visibility:hidden;height:30px'>{GHOST}</div>",
    "contained": f"<div style='contain:paint;height:20px'>top<p>{GHOST}</p></div><div style='overflow-y:clip;"
    "height:20px'>"
    f"top<p>{GHOST}</p></div>",
    "menu of one line": "<ul style='height:19px;overflow:hidden;margin:0;padding:0'>"
    + "".join(f"<li style='display:inline-block;width:30%'>{'item' if n < 3 else 'ghost'} {n}</li>" for n in range(20))
    + "</ul>",
    "grid": "<div style='display:grid;grid-template-columns:repeat(3,1fr);height:60px;overflow:hidden'>"
    + "".join(f"<div style='height:30px'>{'item' if n < 6 else 'ghost'} {n}</div>" for n in range(20))
    + "</div>",
    "ruby": "<ruby>漢<rp>(ghost</rp><rt>han</rt><rp>ghost)</rp></ruby>",
    "joiners": "<table><tr><td height=30>&zwj;&#847;&zwnj;</table><p>&#8203;word</p>",
}
SEEN = {
    "shadow": "<p style='color:transparent;text-shadow:0 0 4px #000'>shadow</p>",
    "stroke": "<p style='color:transparent;-webkit-text-stroke:1px red'>stroke</p>",
    "gradient": "<h1 style='background:linear-gradient(90deg,#c00,#00c);-webkit-background-clip:text;"
    "color:transparent'>"
    "gradient</h1>",
    "drawing": "<svg width=99 height=20><text y=15>drawing</text></svg>",
    "emoji": "<p>😀 emoji 🎉</p>",
    "shortened": "<p style='width:90px;overflow:hidden;white-space:nowrap;text-overflow:ellipsis'>shortened "
    "by dots here</p>",
    "clamped": "<p style='width:90px;display:-webkit-box;-webkit-line-clamp:2;-webkit-box-orient:vertical;"
    "overflow:hidden'>"
    "clamped after two lines of it and more</p>",
    "faint": "<p style='opacity:.05'>faint</p>",
    "first letter": "<style>.f::first-letter{color:red;font-size:30px}.f::first-line{color:blue}</style><p "
    "class=f>first</p>",
    "lined only": "<p><u style='color:transparent;text-decoration-color:red'>lined</u></p>",
}


def document(kinds: Iterable[str]) -> str:
    """A document with these kinds of KINDS and SEEN, one below the other."""
    parts = "".join(f"<section>{(KINDS | SEEN)[kind]}</section>" for kind in kinds)
    head = "<!DOCTYPE html><html><head><meta charset=utf-8><title>t</title></head>"
    return f"{head}<body><h1>head</h1>{parts}<p>end</p></body></html>"
