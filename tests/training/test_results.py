"""What a run has reached: which weights its results speak of."""

import use_model_from_hub as use
from training.results import Results


def test_the_chosen_weights_results_become_the_final_ones_and_the_ends_stay_known(tmp_path):
    results = Results(tmp_path, use.Recipe(), pages=[], rendering=None)
    for label, likeness in (("before", 0.1), ("step 1", 0.5), ("after", 0.2)):
        results.add(label, {"likeness": likeness}, [{"html": f"<p>{label}</p>"}])
    assert results.final == "after"
    results.choose("step 1")
    assert results.final == "step 1"
    likenesses = {label: result["likeness"] for label, result in results.by_label.items()}
    assert likenesses == {"before": 0.1, "step 1": 0.5, "after": 0.5, "last": 0.2}
    assert results.rows["after"] == [{"html": "<p>step 1</p>"}] and results.rows["last"] == [{"html": "<p>after</p>"}]
