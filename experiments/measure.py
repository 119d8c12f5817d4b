"""Compute the exact match of generated answers under every policy and control, for one trained model.

The deployable policies `never`, `always`, `decider`, `entropy` and `entropy-tau` generate their answers with the
package's `generate`. `decider` and `entropy` iterate on a tenth of the tokens. `entropy-tau` iterates on tokens of an
entropy above `TAU`, as the training of the variants with `uncertain` does. A TaH2 model also has `decider-half`, the
decider at the threshold 0.5 of its training; in `entropy` and `entropy-tau` its decider weighs the passes.
The controls are computed along the given texts from the two depths of the same model. An answer counts only if all its
tokens are right. With `attention="own"`, generation gives the same scores; `along_the_text` has those of `never` and
`always` for comparison.

In a mixture, `always` gives all the weight to the last pass, which has seen hard tokens only. So a mixture also has
`always-weighed`: every token iterates, and the decider weighs the passes. Its controls and its curve compare depth 1
with that. With `attention="duo"` answers read the keys of prompt tokens at depth 2, so `decider` and `entropy` iterate
on a tenth of all validation tokens, prompts included.

    random          iterates on as many tokens as the decider, chosen at random; the expected exact match
    second_choice   depth 1's second choice, without a second pass, where the decider iterates
    hindsight       every token at the depth at which it is right; an oracle that cannot be deployed
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from nine.mixture import Mixture
from tah import Confidence, Policy, TaHForCausalLM
from tah.data.scoring import Reference
from tah.names import MIXTURES
from tah.pipeline.experiment.scores import AnswerScores, TokenScores, answer_of, score_answers, score_tokens
from tah.policy import DepthState, Rule
from tah.stats.bootstrap import ranking
from tah.stats.threshold import threshold_for_share
from tasks import Task
from variants import TAU, weights_of

SHARE = 0.1  # share of generated tokens that a policy may iterate on
SHARES = (0.03, 0.05, 0.08, 0.1, 0.15)  # iterated shares of the curve
NINE_SHARE = 0.25  # in the nine tasks 3 of 7 tokens are answers, and half of the answers take more than one step
NINE_SHARES = (*SHARES, 0.2, 0.25, 0.3, 0.4)
GAIN = 0.05  # nats; a second pass with a larger decrease of the loss counts as a gain
CONFIDENT = 1 - math.exp(-TAU)  # continue probability of a token with an entropy of `TAU`


class EntropyDecides(Policy):
    """Policy by entropy in a mixture, whose passes the decider weighs.

    Args:
        decider: Decider of the model.
        threshold: Threshold of 1 - exp(-entropy); below 0 every token iterates.
    """

    def __init__(self, decider: Any, threshold: float) -> None:
        self.layers = decider.layers
        self.decider, self.threshold, self.entropy = decider, threshold, Confidence("entropy")

    def __call__(self, state: DepthState) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the decider's continue logits, and whether the entropy exceeds the threshold, `[N]`."""
        return self.decider(state), self.entropy(state).sigmoid() > self.threshold


@torch.no_grad()
def evaluate(model: TaHForCausalLM, tokenizer: Any, task: Task | Mixture, test: int, validation: int) -> dict[str, Any]:
    """Return the scores on held-out problems (`test`) and on problems of the training (`seen`).

    Validation problems determine the thresholds.

    Args:
        model: Trained model.
        tokenizer: Tokenizer of the task.
        task: Family of problems.
        test: Number of problems to score per set.
        validation: Number of validation problems.
    """
    model.eval()
    rules = {"never": Rule("never")}
    if model.config.max_depth > 1:
        rules["always"] = Rule("always")
        learned: dict[str, str | Policy] = {"entropy": Confidence("entropy")}
        if model.decider is not None:
            learned = {"decider": "decider"} | learned
        share = NINE_SHARE if isinstance(task, Mixture) else SHARE
        held_out = _rows(task, task.take("validation", validation, distinct=True), tokenizer)
        if model.config.attention == "duo":
            held_out = [row | {"supervised": np.ones_like(row["supervised"])} for row in held_out]
        for name, policy in learned.items():
            probability = score_tokens(model, held_out, tokenizer.pad_token_id, Rule(policy, 1.0)).probability
            rules[name] = Rule(policy, threshold_for_share(probability, share))
        rules["entropy-tau"] = Rule(Confidence("entropy"), CONFIDENT)
        if model.config.output in MIXTURES:
            rules["decider-half"] = Rule("decider", 0.5)
            rules["always-weighed"] = Rule(EntropyDecides(model.decider, -1.0), 0.5)
            for name in ("entropy", "entropy-tau"):
                rules[name] = Rule(EntropyDecides(model.decider, rules[name].threshold), rules[name].threshold)
    sets = {"test": task.take("test", test, distinct=True), "seen": task.take("train", test, distinct=True)}
    return {name: _score(model, tokenizer, task, problems, rules) for name, problems in sets.items()}


def _score(
    model: TaHForCausalLM, tokenizer: Any, task: Task | Mixture, problems: list[Any], rules: dict[str, Rule]
) -> dict[str, Any]:
    """Return the scores of one set of problems.

    Returns:
        `policies`: exact match, iterated share of the generated tokens, threshold, and `right`, one hexadecimal bit per
        problem, by policy; for the nine tasks also `flops` of an answer. `by_operations`: exact match by the number of
        operations, for the nine tasks by the largest number of steps of a question. `by_task`, for the nine tasks:
        exact match and iterated share. If the model has more than one depth, also the fields of `_second_pass`.
    """
    nine = isinstance(task, Mixture)
    operations = np.array([max(map(len, its.traces)) if nine else its.steps for its in problems])
    names = np.array([its.task if nine else "" for its in problems])
    policies, by_operations, by_task = {}, {}, {}
    for name, rule in rules.items():
        answered = _answers(model, tokenizer, task, problems, names, rule)
        right = np.zeros(len(problems), bool)
        for one, its in answered.items():
            right[names == one] = its.right
        tokens, iterated = (sum(getattr(its, what) for its in answered.values()) for what in ("tokens", "iterated"))
        policies[name] = {
            "exact_match": float(right.mean()),
            "iterated": iterated / tokens,
            "threshold": rule.threshold,
            "right": np.packbits(right).tobytes().hex(),
        }
        by_operations[name] = {str(count): float(right[operations == count].mean()) for count in np.unique(operations)}
        if nine:
            rows = _rows(task, problems, tokenizer)
            policies[name]["flops"] = answer_flops(model, tokenizer, rows, rule, iterated / len(problems))
            by_task[name] = {
                one: {"exact_match": float(its.right.mean()), "iterated": its.iterated_share}
                for one, its in answered.items()
            }
    found = {"problems": len(problems), "policies": policies, "by_operations": by_operations}
    if nine:
        found["by_task"] = by_task
    if len(rules) == 1:
        return found
    rows, scores = _rows(task, problems, tokenizer), {}
    for name, rule in rules.items():  # at threshold 1 no token iterates, and the probabilities are recorded
        if name in ("entropy-tau", "decider-half", "always-weighed"):  # those of `entropy`, `decider` and `always`
            continue
        if name == "always":
            rule = rules.get("always-weighed", rule)
        elif name != "never":
            rule = Rule(Confidence("entropy") if name == "entropy" else rule.policy, 1.0)
        scores[name] = score_tokens(model, rows, tokenizer.pad_token_id, rule)
    guide = "decider" if "decider" in rules else "entropy"
    chosen = scores[guide].probability > rules[guide].threshold
    policies |= _controls(scores, _ranks(model, rows), chosen)
    if guide == "decider":
        found["choices"] = _choices(scores, {name: rules[name].threshold for name in ("decider", "entropy")})
    return found | _second_pass(scores, NINE_SHARES if nine else SHARES)


def _rows(task: Task | Mixture, problems: Any, tokenizer: Any) -> list[dict[str, Any]]:
    rows = task.rows(problems, tokenizer)
    return [rows[at] for at in range(len(rows))]


def _answers(
    model: TaHForCausalLM, tokenizer: Any, task: Task | Mixture, problems: list[Any], names: np.ndarray, rule: Rule
) -> dict[str, AnswerScores]:
    """Return the generated answers by the name `names` `[R]` of each problem's task."""
    read = str.strip if isinstance(task, Mixture) else answer_of
    groups = {
        str(one): [task.question(problems[at]) for at in np.flatnonzero(names == one)] for one in np.unique(names)
    }
    return {one: score_answers(model, tokenizer, its, rule, read=read) for one, its in groups.items()}


def answer_flops(
    model: TaHForCausalLM, tokenizer: Any, rows: list[dict[str, Any]], rule: Rule, iterated: float
) -> float:
    """Return the mean FLOPs of an answer: 2 per weight and token. Attention itself and norms are not counted.

    With `attention="duo"`, the passes of prompt tokens are counted, as many as along the given text. Otherwise no token
    reads them, so an implementation can leave them out.

    Args:
        model: Model that answers.
        tokenizer: Tokenizer with a padding token.
        rows: Rows of the problems.
        rule: Policy and threshold.
        iterated: Mean number of generated tokens that iterate.
    """
    its, made = weights_of(model), float(np.mean([np.sum(row["supervised"]) for row in rows]))
    prompt = float(np.mean([len(row["input_ids"]) for row in rows])) - made
    decided, again = made, iterated
    if model.config.attention == "duo" and rule.policy != "never":
        along = score_tokens(model, rows, tokenizer.pad_token_id, rule)
        again += along.share_of_all * (prompt + made) - float((along.passes > 1).sum()) / len(rows)
        decided += prompt
    mixed = its.head if model.config.next_input == "topk" else 0  # a sum of embeddings; the head was counted
    decider = its.decider * decided if rule.policy == "decider" else 0.0
    deeper = its.body + its.added - its.decider + its.head + mixed
    return 2 * (its.body * (prompt + made - 1) + its.head * decided + decider + again * deeper)


def _ranks(model: TaHForCausalLM, rows: list[dict[str, Any]]) -> np.ndarray:
    """Return the rank `[n]` of each token of the text after depth 1; 0 is the first choice."""
    model.config.policy = "never"
    measured = Reference(model).measure([row["input_ids"] for row in rows], [row["supervised"] for row in rows], 16384)
    return np.concatenate(
        [its.rank[:-1][np.asarray(row["supervised"])[1:]] for its, row in zip(measured, rows, strict=True)]
    )


def exact(right: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return the probability that all tokens of a row are right.

    Args:
        right: Probability that a token is right, `[n]`.
        row: Row of each token, `[n]`.

    Returns:
        Probabilities `[R]`.
    """
    result = np.ones(row.max() + 1)
    np.multiply.at(result, row, right.astype(np.float64))
    return result


def _controls(scores: dict[str, TokenScores], ranks: np.ndarray, chosen: np.ndarray) -> dict[str, dict[str, Any]]:
    one, two = scores["never"], scores["always"]
    share = float(chosen.mean())
    outcomes = {
        "random": (share, share * two.right + (1 - share) * one.right),
        "second_choice": (0.0, np.where(chosen, ranks == 1, one.right)),
        "hindsight": (float((~one.right & two.right).mean()), one.right | two.right),
    }
    return {
        name: {"exact_match": float(exact(right, one.row).mean()), "iterated": iterated}
        for name, (iterated, right) in outcomes.items()
    }


def _choices(scores: dict[str, TokenScores], thresholds: dict[str, float]) -> dict[str, dict[str, int]]:
    """Return where decider and entropy choose alike or differently, each at its threshold.

    Returns:
        For `both`, `decider_only`, `entropy_only`, `neither` and `confident` (tokens of an entropy up to `TAU`): the
        number of `tokens`; of those that depth 1 gets `wrong`; of those that the second pass mends (`mended`) and
        breaks (`broken`). Also `mended_by_decider`: those mended among the tokens that the decider chooses.
    """
    one, two = scores["never"].right, scores["always"].right
    decider, entropy = (scores[name].probability > thresholds[name] for name in ("decider", "entropy"))
    groups = {
        "both": decider & entropy,
        "decider_only": decider & ~entropy,
        "entropy_only": ~decider & entropy,
        "neither": ~decider & ~entropy,
        "confident": scores["entropy"].probability <= CONFIDENT,
    }
    counted = {"wrong": ~one, "mended": ~one & two, "broken": one & ~two, "mended_by_decider": ~one & two & decider}
    return {
        name: {"tokens": int(group.sum())} | {what: int((group & its).sum()) for what, its in counted.items()}
        for name, group in groups.items()
    }


def _second_pass(scores: dict[str, TokenScores], shares: tuple[float, ...]) -> dict[str, Any]:
    """Return what choosing tokens gains.

    Returns:
        `curve`: exact match by iterated share. `finding`: how well each policy's probability ranks the tokens with a
        gain. `gained`, `mended`, `broken`: shares of the tokens whose loss the second pass lowers by more than `GAIN`,
        that it corrects, and that it breaks. `along_the_text`: exact match of `never` and `always`.
    """
    one, two = scores["never"], scores["always"]
    gained = one.loss - two.loss > GAIN
    curve, finding = {}, {}
    for name in scores.keys() - {"never", "always"}:
        probability = scores[name].probability
        curve[name] = {
            str(share): float(
                exact(
                    np.where(probability > threshold_for_share(probability, share), two.right, one.right), one.row
                ).mean()
            )
            for share in shares
        }
        (auroc,), (average_precision,) = ranking(probability, gained)
        finding[name] = {"auroc": float(auroc), "average_precision": float(average_precision)}
    return {
        "curve": curve,
        "finding": finding,
        "gained": float(gained.mean()),
        "mended": float((~one.right & two.right).mean()),
        "broken": float((one.right & ~two.right).mean()),
        "along_the_text": {name: float(exact(scores[name].right, one.row).mean()) for name in ("never", "always")},
    }
