"""What a run tells of itself while it trains."""

from training.progress import draw_loss


def test_loss_picture_survives_an_empty_history(tmp_path):
    draw_loss([], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
