"""What a user would do instead of craft, each as a function of a `Job`: for `own_data.py`, one fresh process each.

`constant`, `tfidf`, `embeddings` and `embeddings_pair` (scikit-learn), `lora` and `full` (peft, transformers Trainer), and
`setfit`, which may live in a virtual environment of its own: `python peers.py JOB.json` runs it and prints its answer.
Rates and epochs are chosen on a tenth of the training rows, split off; nothing here sees the gold of the test rows.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LENGTH = 128
"""Tokens kept of a row, as craft does."""

DENSE = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
"""Strengths C for standardised embeddings."""


@dataclass(frozen=True)
class Job:
    """Rows to learn from and rows to answer.

    Attributes:
        model: folder of the base model.
        texts: of the training rows, one or two each.
        gold: names of labels, or numbers in a regression.
        test: texts of the rows to answer.
        labels: all names, the positive one of two last; empty in a regression.
        metrics: the task's; the first one chooses rates and epochs.
        seed: of splits, heads and orders.
        rates: to choose from; one is taken as it is.
        epochs: of the Trainer.
        rank: of LoRA; 0 trains everything.
        steps: of SetFit.
    """

    model: str
    texts: Sequence[Sequence[str]]
    gold: Sequence[Any]
    test: Sequence[Sequence[str]]
    labels: Sequence[str]
    metrics: Sequence[str]
    seed: int
    rates: Sequence[float] = ()
    epochs: int = 10
    rank: int = 0
    steps: int = 300

    @property
    def numbers(self) -> list[Any]:
        """Gold as a model takes it."""
        return [list(self.labels).index(value) for value in self.gold] if self.labels else list(self.gold)

    def named(self, predictions: Any) -> list[Any]:
        """Predictions as gold is written."""
        return [self.labels[int(value)] if self.labels else float(value) for value in predictions]


def score(metrics: Sequence[str], labels: Sequence[str], gold: Sequence[Any], found: Sequence[Any]) -> dict[str, float]:
    """Every metric of these predictions; the same for craft and all peers."""
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    known: dict[str, Callable[[], float]] = {
        "accuracy": lambda: accuracy_score(gold, found),
        "f1": lambda: f1_score(gold, found, pos_label=labels[-1], zero_division=0),
        "macro_f1": lambda: f1_score(gold, found, average="macro", labels=list(labels), zero_division=0),
        "matthews_correlation": lambda: matthews_corrcoef(gold, found),
        "pearson": lambda: pearsonr(gold, found)[0] if len(set(found)) > 1 else 0.0,
    }
    return {name: float(known[name]()) for name in metrics}


def constant(job: Job) -> dict[str, Any]:
    """The most frequent label, or the mean."""
    began = time.perf_counter()
    gold = list(job.gold)
    guess = max(sorted(set(gold)), key=gold.count) if job.labels else sum(gold) / len(gold)
    return {"found": [guess] * len(job.test), "seconds": time.perf_counter() - began, "numbers": 0}


# -- scikit-learn over fixed features ------------------------------------------------------------------------------------


def tfidf(job: Job) -> dict[str, Any]:
    """Words and pairs of words, those of each text of a pair apart."""
    began = time.perf_counter()
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer

    columns = list(zip(*job.texts, strict=True))
    words = [TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit(column) for column in columns]

    def features(texts: Sequence[Sequence[str]]) -> Any:
        parts = zip(words, zip(*texts, strict=True), strict=True)
        return hstack([one.transform(column) for one, column in parts]).tocsr()

    return _fitted(job, features, began, strengths=(0.1, 1.0, 10.0, 100.0, 1000.0))


def embeddings(job: Job) -> dict[str, Any]:
    """Means of the base model's last states; a pair is one input, as craft reads it."""
    began = time.perf_counter()
    return _fitted(job, lambda texts: embed(job.model, texts), began, strengths=DENSE, standardise=True)


def embeddings_pair(job: Job) -> dict[str, Any]:
    """Each text of a pair by itself, u and v: the features u, v, |u - v| and u v."""
    began = time.perf_counter()
    import numpy

    def features(texts: Sequence[Sequence[str]]) -> Any:
        one, two = (embed(job.model, [[text] for text in column]) for column in zip(*texts, strict=True))
        return numpy.hstack([one, two, abs(one - two), one * two])

    return _fitted(job, features, began, strengths=DENSE, standardise=True)


def embed(folder: str, texts: Sequence[Sequence[str]], batch: int = 32) -> Any:
    """Mean over the tokens of the last layer, (rows, width)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda row: sum(map(len, texts[row])))
    found: Any = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(texts), batch):
        rows = order[start : start + batch]
        columns = [list(column) for column in zip(*(texts[row] for row in rows), strict=True)]
        inputs = tokenizer(*columns, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs).last_hidden_state  # (batch, tokens, width)
        mask = inputs["attention_mask"].unsqueeze(-1)
        found[rows] = (states * mask).sum(1) / mask.sum(1)
    return found.numpy()


def _fitted(
    job: Job, features: Callable[..., Any], began: float, strengths: Sequence[float], *, standardise: bool = False
) -> dict[str, Any]:
    """Logistic or ridge regression, its strength by five-fold cross-validation on the training rows.

    What chooses is the task's first metric, as for the Trainer; squared error in a regression.
    """
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    if job.labels:
        folds: Any = StratifiedKFold(5, shuffle=True, random_state=job.seed)
        by = {"matthews_correlation": "matthews_corrcoef"}.get(job.metrics[0], job.metrics[0])
        search = GridSearchCV(LogisticRegression(max_iter=2000), {"C": strengths}, cv=folds, scoring=by)
    else:
        folds = KFold(5, shuffle=True, random_state=job.seed)
        grid = [0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5]
        search = GridSearchCV(Ridge(), {"alpha": grid}, cv=folds, scoring="neg_mean_squared_error")
    train = features(job.texts)
    scaler = StandardScaler().fit(train) if standardise else None
    search.fit(scaler.transform(train) if scaler else train, job.numbers)
    seconds = time.perf_counter() - began
    test = features(job.test)
    fitted: Any = search.best_estimator_
    return {
        "seconds": seconds,
        "found": job.named(search.predict(scaler.transform(test) if scaler else test)),
        "numbers": int(fitted.coef_.size + getattr(fitted.intercept_, "size", 1)),
        "strength": next(iter(search.best_params_.values())),
    }


# -- the Trainer ---------------------------------------------------------------------------------------------------------


def fine_tuned(job: Job) -> dict[str, Any]:
    """LoRA of query and value, or everything, at the best of the rates; the best epoch of each, ties by loss.

    Batches of 16 rows of similar length, as craft has them. `seconds` are those of the chosen rate alone.
    """
    began = time.perf_counter()
    from sklearn.model_selection import train_test_split

    rows = list(range(len(job.gold)))
    kinds = job.numbers if job.labels and min(map(job.numbers.count, set(job.numbers))) > 1 else None
    train, held = train_test_split(rows, test_size=0.1, random_state=job.seed, stratify=kinds)
    tried: dict[float, Any] = {}
    for rate in job.rates:
        started = time.perf_counter()
        trainer, metrics, numbers = _trained(job, train, held, rate)
        tried[rate] = (trainer, metrics, numbers, time.perf_counter() - started)
    rate = max(tried, key=lambda rate: tried[rate][1]["choice"])
    trainer, metrics, numbers, seconds = tried[rate]
    apart = time.perf_counter() - began - sum(one[-1] for one in tried.values())
    trainer.args.train_sampling_strategy = "random"  # or it would answer in an order of its own
    logits = trainer.predict(_encoded(job.model, job.test)).predictions
    return {
        "seconds": seconds + apart,
        "found": job.named(logits.argmax(-1) if job.labels else logits.squeeze(-1)),
        "numbers": numbers,
        "rate": rate,
        "epochs": job.epochs,
        "best_epoch": metrics.pop("epoch"),
        "validation": metrics,
        "tried": {str(rate): one[1]["choice"] for rate, one in tried.items()},
    }


def _trained(job: Job, train: Sequence[int], held: Sequence[int], rate: float) -> tuple[Any, dict[str, float], int]:
    """The trainer with its best epoch loaded, that epoch's metrics on the rows held out, and the numbers trained."""
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PrinterCallback,
        Trainer,
        TrainingArguments,
        set_seed,
    )
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(job.seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=len(job.labels) or 1)
    model.config.problem_type = "single_label_classification" if job.labels else "regression"
    if job.rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(task_type="SEQ_CLS", r=job.rank, lora_alpha=16, target_modules=["query", "value"])
        model = get_peft_model(model, lora)  # this task type trains the head too

    def measure(outputs: Any) -> dict[str, float]:
        logits, gold = (torch.tensor(part) for part in outputs)
        found = job.named(logits.argmax(-1) if job.labels else logits.squeeze(-1))
        cross = torch.nn.functional.cross_entropy
        loss = float(cross(logits, gold) if job.labels else ((logits.squeeze(-1) - gold) ** 2).mean())
        metrics = score(job.metrics, job.labels, job.named(gold), found)
        return metrics | {"choice": metrics[job.metrics[0]] - 1e-4 * loss}

    encoded = _encoded(job.model, job.texts, job.numbers)
    train_rows, held_rows = ([encoded[row] for row in rows] for rows in (train, held))
    batch = 16
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, use_cpu=True, seed=job.seed, learning_rate=rate, lr_scheduler_type="linear",
                warmup_steps=int(0.06 * job.epochs * -(-len(train) // batch)), num_train_epochs=job.epochs,
                per_device_train_batch_size=batch, per_device_eval_batch_size=64, eval_strategy="epoch",
                save_strategy="epoch", save_total_limit=1, save_only_model=True, load_best_model_at_end=True,
                metric_for_best_model="choice", greater_is_better=True, report_to="none", disable_tqdm=True,
                dataloader_pin_memory=False, train_sampling_strategy="group_by_length",
            ),
            train_dataset=train_rows,
            eval_dataset=held_rows,
            processing_class=AutoTokenizer.from_pretrained(job.model),
            compute_metrics=measure,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = [line for line in trainer.state.log_history if "eval_choice" in line]
    best = max(logged, key=lambda line: line["eval_choice"])
    names = [*job.metrics, "loss", "choice"]
    metrics = {name: float(best[f"eval_{name}"]) for name in names} | {"epoch": float(best["epoch"])}
    return trainer, metrics, sum(one.numel() for one in model.parameters() if one.requires_grad)


def _encoded(folder: str, texts: Sequence[Sequence[str]], gold: Sequence[Any] | None = None) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=LENGTH)
    rows = [{name: encoded[name][row] for name in encoded} for row in range(len(texts))]
    return rows if gold is None else [row | {"label": label} for row, label in zip(rows, gold, strict=True)]


# -- SetFit --------------------------------------------------------------------------------------------------------------


def setfit(job: Job) -> dict[str, Any]:
    """SetFit with its defaults but the number of steps; a pair is one text with a separator."""
    began = time.perf_counter()
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    train, test = ([" [SEP] ".join(texts) for texts in part] for part in (job.texts, job.test))
    model = SetFitModel.from_pretrained(job.model)
    model.model_body.max_seq_length = LENGTH
    with tempfile.TemporaryDirectory() as folder:
        given = TrainingArguments(
            output_dir=folder, batch_size=16, max_steps=job.steps, seed=job.seed, report_to="none", save_strategy="no",
            show_progress_bar=False,
        )  # fmt: skip
        trainer = Trainer(model, given, train_dataset=Dataset.from_dict({"text": train, "label": job.numbers}))
        trainer.train()
    seconds = time.perf_counter() - began
    numbers = sum(one.numel() for one in model.model_body.parameters()) + model.model_head.coef_.size
    found = job.named(model.predict(test, as_numpy=True, show_progress_bar=False))
    return {"seconds": seconds, "found": found, "numbers": int(numbers), "steps": job.steps}


def setfit_apart(job: Job, python: str) -> dict[str, Any]:
    """`setfit` by another interpreter, whose environment has it."""
    import subprocess

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(asdict(job)))
        done = subprocess.run([python, __file__, file], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


PEERS: dict[str, Callable[..., dict[str, Any]]] = {
    "constant": constant,
    "tfidf": tfidf,
    "embeddings": embeddings,
    "embeddings-pair": embeddings_pair,
    "setfit": setfit_apart,
    "lora-8": fine_tuned,
    "lora-1": fine_tuned,
    "full": fine_tuned,
}

if __name__ == "__main__":
    print(json.dumps(setfit(Job(**json.loads(Path(sys.argv[1]).read_text())))))
