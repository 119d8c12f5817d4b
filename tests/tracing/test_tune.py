"""`tah tune`: the threshold that meets a target, and the file that holds it."""

import hashlib
import json

import numpy as np
import pytest

from helpers.traces import fails, made, random_trace, works
from tah import TaHForCausalLM
from tah.load import FOLLOW
from tah.tracing.overthinking import statistics
from tah.tracing.tune import tune


def test_tune_chooses_the_threshold():
    traced = random_trace(N=200)
    for share in (0.0, 0.07, 0.5, 1.0):
        assert tune(traced, f"share={share}")["iterated"] == pytest.approx(share, abs=0.003)
    best = tune(traced, "loss")
    curve = statistics(traced, samples=0)["curves"]["decider"]
    tokens = traced.tokens()

    def loss_at(threshold):
        depth = 1 + (np.minimum.accumulate(tokens.decider) > threshold).sum(0)
        return -np.log(tokens.prob[depth - 1, np.arange(200)]).mean()

    every = [loss_at(threshold) for threshold in [*tokens.decider.ravel(), 0.0, 1.0]]
    assert best["loss"] == pytest.approx(min(every)) and best["loss"] <= min(curve["loss"]) + 1e-12
    assert loss_at(best["threshold"]) == pytest.approx(best["loss"])
    coarse = random_trace(N=200, coarse=True)
    assert tune(coarse, "loss")["loss"] == pytest.approx(
        min(statistics(coarse, samples=0)["curves"]["decider"]["loss"])
    )
    with pytest.raises(ValueError, match="does not contain the score 'decider'"):
        tune(made([[1], [0]], [[0.2], [0.4]]), "loss")
    mixture = made([[1], [0]], [[0.2], [0.4]], [[0.5]], output="mixture", policy="always")
    with pytest.raises(ValueError, match="weighs the passes of its mixture by the policy always"):
        tune(mixture, "loss")
    for target in ("share=2", "share=", "share", "shares=0.1", "less", "share=nan"):
        with pytest.raises(ValueError, match=f"target '{target}' is not one of loss, share=X"):
            tune(traced, target)


# -- the command -------------------------------------------------------------------------------------------------------


def test_tune_writes_the_threshold_and_nothing_else(capsys, checkpoint, monkeypatch):
    def hashes():
        files = [path for path in checkpoint.iterdir() if path.name != "config.json"]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    config, others = checkpoint / "config.json", hashes()
    before = config.read_text()
    said = works(capsys, "tune", checkpoint, "page.txt", "--target", "share=0.25")
    assert "(was 0.5): 2" in said and f"written to {config}" in said and hashes() == others
    after = config.read_text()
    threshold = json.loads(after)["threshold"]
    assert threshold != 0.5 and after.replace(f'"threshold": {threshold!r}', '"threshold": 0.5') == before
    model = TaHForCausalLM.from_pretrained(checkpoint)
    assert model.config.threshold == threshold
    stats = json.loads(works(capsys, "trace", checkpoint, "page.txt", "--json"))
    assert stats["policies"]["own policy"]["iterated"]["value"] == pytest.approx(0.25, abs=0.01)
    found = json.loads(works(capsys, "tune", checkpoint, "page.txt", "--target", "loss", "--json"))
    assert found["before"] == threshold and json.loads(config.read_text())["threshold"] == found["threshold"]
    best = json.loads(works(capsys, "trace", checkpoint, "page.txt", "--json"))
    assert best["policies"]["own policy"]["loss"]["value"] == pytest.approx(found["loss"], rel=1e-4)

    before = config.read_text()
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in fails(capsys, "tune", checkpoint, "page.txt", "--target", "share=0.1")
    assert config.read_text() == before and hashes() == others


def test_tune_refuses(capsys, checkpoint, tiny_base):
    assert "target 'share=7' is not one of" in fails(capsys, "tune", checkpoint, "page.txt", "--target", "share=7")
    assert "is not a TaH checkpoint" in fails(capsys, "tune", tiny_base, "page.txt", "--target", "loss")
    in_the_box = (FOLLOW / "config.json").read_bytes()
    assert "follow-tah is not a local directory" in fails(capsys, "tune", "follow-tah", "page.txt", "--target", "loss")
    assert (FOLLOW / "config.json").read_bytes() == in_the_box
    config = checkpoint / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"policy": "always"}))
    message = fails(capsys, "tune", checkpoint, "page.txt", "--target", "loss")
    assert "has the policy 'always', which has no threshold" in message


@pytest.mark.parametrize("measure", ["probability", "entropy"])
def test_tune_confidence(capsys, checkpoint, measure):
    config = checkpoint / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"policy": "confidence", "confidence_measure": measure})
    )
    works(capsys, "tune", checkpoint, "page.txt", "--target", "share=0.3")
    stats = json.loads(works(capsys, "trace", checkpoint, "page.txt", "--json"))
    assert stats["policies"]["own policy"]["iterated"]["value"] == pytest.approx(0.3, abs=0.01)
