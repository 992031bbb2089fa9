"""The settings of a page."""

from making.page_settings import Settings


def test_widths_are_dealt_out_by_name_and_stay():
    settings = Settings(widths=(1280, 390))
    widths = [settings.width_of(f"page-{number}") for number in range(200)]
    assert widths == [settings.width_of(f"page-{number}") for number in range(200)]
    assert 60 < widths.count(390) < 140
