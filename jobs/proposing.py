"""Search spaces as Optuna knows them: what it proposes next, what it is told, and how much each dimension matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmagent import space as spaces
from mmagent.space import Dimension, Sample

_FEWEST = 4  # trials that say anything about importance
_MOST = 256  # that it is computed from: each tree compares all its leaves, and a thousand trials took half a minute


def study(seed: int) -> Any:
    """Tree-structured Parzen estimators (Bergstra et al. 2011), of one objective, higher is better."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, multivariate=False)
    return optuna.create_study(direction="maximize", sampler=sampler)


def propose(asked: Any, dims: Sequence[Dimension]) -> dict[str, Any]:
    """What Optuna proposes, one dimension after the other: what does not exist is not asked."""
    out: dict[str, Any] = {}
    for each in dims:
        if not each.exists(out):
            continue
        if each.kind == "choice":
            place = asked.suggest_categorical(each.key, list(range(len(each.options))))
            out[each.key] = each.options[place]
        elif each.kind == "integer":
            out[each.key] = asked.suggest_int(each.key, int(each.low), int(each.high))
        else:
            found = asked.suggest_float(each.key, each.low, each.high, log=each.kind == "loguniform")
            out[each.key] = spaces.rounded(found)
    return out


def known(raw: Mapping[str, Any], dims: Sequence[Dimension], quality: float) -> Any:
    """A trial as Optuna knows one; none where the recipe's own values lie outside of the space."""
    import optuna

    distributions: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for each in dims:
        if each.key not in raw or not each.exists(raw):
            continue
        if each.share(raw[each.key]) is None:
            return None
        if each.kind == "choice":
            distributions[each.key] = optuna.distributions.CategoricalDistribution(list(range(len(each.options))))
            values[each.key] = each.options.index(raw[each.key])
        elif each.kind == "integer":
            distributions[each.key] = optuna.distributions.IntDistribution(int(each.low), int(each.high))
            values[each.key] = int(raw[each.key])
        else:
            log = each.kind == "loguniform"
            distributions[each.key] = optuna.distributions.FloatDistribution(each.low, each.high, log=log)
            values[each.key] = float(raw[each.key])
    return optuna.trial.create_trial(params=values, distributions=distributions, value=quality)


def importance(scores: Sequence[tuple[Sample, float]], dims: Sequence[Dimension], seed: int = 0) -> dict[str, float]:
    """The share of the variance of a score that each dimension explains (functional ANOVA over a random forest:
    Hutter et al. 2014), the largest first; of those that every trial has. Empty where trials are too few, or equal.

    Args:
        scores: of trials as alike as may be, not of how long they went.
    """
    import optuna

    trials = [known(spaces.raw(sample, dims), dims, score) for sample, score in scores]
    trials = [trial for trial in trials if trial is not None]
    trials = trials[:: -(-len(trials) // _MOST)] if trials else []  # from begin to end
    if len(trials) < _FEWEST or len({trial.value for trial in trials}) < 2:
        return {}
    made = study(seed)
    made.add_trials(trials)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    try:
        return dict(optuna.importance.get_param_importances(made, evaluator=evaluator))
    except (RuntimeError, ValueError):  # nothing that they share differs
        return {}
