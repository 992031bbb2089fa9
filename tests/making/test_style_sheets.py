"""Style sheets: what reading, greying and shortening leave as it is, and what goes."""

from making.style_sheets import parse_css, reduced_body, short_declarations, squeeze, without_unused_names, write_css


def test_css_survives_parsing_and_writing():
    css = 'a:not([href="}{;"]){b:url(x;y{)}\n@media (a){p{c:"\\"}"}}\n@layer one;\n@font-face{d:e}'
    assert write_css(parse_css("/* } */" + css)) == css
    assert write_css(parse_css("a{b:c")) == "a{b:c}"  # what a browser closes


def test_declarations_that_show_nothing_go():
    body = "display:-ms-flexbox;display:flex;-webkit-mask:x;mask:x;cursor:pointer;color:red!important;color:blue"
    assert reduced_body(body, {("display", "-ms-flexbox"): False}) == "display:flex;mask:x;color:red!important"
    assert reduced_body("color:red;color:var(--x)", {}) == "color:red;color:var(--x)"


def test_squeezing_leaves_strings_and_calculations_alone():
    assert squeeze("a  >  b , c", ",>") == "a>b,c"
    body = 'width: calc(1px  +  2px) ; content : "a  ,  b"'
    assert short_declarations(body) == 'width:calc(1px + 2px);content:"a  ,  b"'


def test_unused_custom_properties_and_keyframes_go():
    css = ":root{--a:1px;--b:var(--a);--c:2px;color:red}\np{margin:var(--c);animation:on 1s}\n@keyframes on{to{x:y}}"

    def kept(css: str, styles: str = "") -> str:
        return write_css(*without_unused_names([parse_css(css)], styles))

    assert (
        kept(css + "\n@keyframes off{to{x:y}}")
        == ":root{--c:2px;color:red}\np{margin:var(--c);animation:on 1s}\n@keyframes on{to{x:y}}"
    )
    assert "--a:1px" in kept(css, "width:var(--a)")
