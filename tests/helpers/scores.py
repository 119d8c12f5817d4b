"""Plain references for rank, probability and entropy: a sort and a softmax of whole rows, in float64."""

import torch


def plain_scores(logits, target, k=0):
    """Rank, probability and entropy of `target` under logits [V], the k best tokens, and their probabilities."""
    order = (-logits.double()).sort(stable=True).indices.tolist()  # of equal logits the lower id comes first
    p = logits.double().softmax(-1)
    entropy = torch.special.entr(p).sum().item()
    return order.index(int(target)), p[target].item(), entropy, order[:k], p[order[:k]].tolist()


@torch.no_grad()
def plain_row_scores(model, ids, supervised):
    """Ranks, probabilities and entropies of a row, from a forward of that row alone; -1, 0, 0 elsewhere."""
    logits = model(input_ids=torch.tensor(ids)[None]).logits[0]
    result = [[-1] * len(ids), [0.0] * len(ids), [0.0] * len(ids)]
    for t in range(len(ids) - 1):
        if supervised[t + 1]:
            for values, value in zip(result, plain_scores(logits[t], ids[t + 1])[:3], strict=True):
                values[t] = value
    return result
