"""The trainings of `train_short_test_long.py`, several at a time, each in a process with a fixed number of threads."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils import logging

from short_long_results import Results
from short_long_training import Run, Settings, build_model, read_by_length, train
from step_cost import peak_bytes, time_steps, train_step

ROUNDS = 20  # in which steps are timed
_steps: Any = None  # counts the steps of all processes; set in each


def run_all(runs: list[Run], settings: Settings, tokens: Path, jobs: int, results: Results, console: Console) -> None:
    """Do the trainings that `results` lacks, and measure what a step costs; `tokens` is a file for `torch.load`."""
    missing = results.missing(runs)
    if len(missing) < len(runs):
        console.print(f"{len(runs) - len(missing)} of {len(runs)} trainings are finished already.")
    context = multiprocessing.get_context("spawn")
    steps = context.Value("q", 0)
    with ProcessPoolExecutor(jobs, context, start_worker, (steps, settings.threads)) as pool:
        futures = {pool.submit(train_and_read, run, settings, tokens): run for run in missing}
        try:
            watch(futures, steps, settings.steps * len(missing), results, console)
            if not results.step_costs:  # when no training runs
                results.step_costs = pool.submit(measure_steps, settings, tokens).result()
                results.save()
        finally:
            pool.shutdown(cancel_futures=True)


def watch(futures: dict[Future, Run], steps: Any, total: int, results: Results, console: Console) -> None:
    """Show how far the trainings are, and keep each when it is finished."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=total)
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            progress.update(task, completed=steps.value)
            for future in done:
                figures = future.result()
                results.add(futures[future], figures)
                console.print(f"{futures[future]}: {summary(figures)}", highlight=False, soft_wrap=True)


def summary(figures: dict[str, Any]) -> str:
    """Return the perplexities of one training as first read, by length."""
    title = figures["readings"][0]["read_as"]
    rows = [row for row in figures["readings"] if (row["read_as"], row["protocol"]) == (title, "non-overlapping")]
    values = (f"{row['perplexity']:.1f}" if row["perplexity"] else "fails" for row in rows)
    return f"perplexity {' / '.join(values)} at {' / '.join(str(row['length']) for row in rows)}"


def start_worker(steps: Any, threads: int) -> None:
    """Prepare a process: it ends when the one that started it does, however that ended."""
    global _steps
    _steps = steps
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    parent = multiprocessing.parent_process()
    if parent is not None:
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def train_and_read(run: Run, settings: Settings, tokens: Path) -> dict[str, Any]:
    """Do one training and read its model; returns all figures."""
    train_tokens, held_out = torch.load(tokens)
    model, figures = train(run, settings, train_tokens, count_step)
    return {**figures, "readings": read_by_length(model, run, settings, held_out)}


def count_step() -> None:
    """Tell the process that watches."""
    with _steps.get_lock():
        _steps.value += 1


def measure_steps(settings: Settings, tokens: Path) -> list[dict[str, Any]]:
    """Return time and memory of a training step with ALiBi at L, and with sinusoidal positions at L and 2 L.

    Fused attention and eager attention, which holds the scores of all heads as the code of the paper does.
    """
    train_tokens, _ = torch.load(tokens)
    costs, steps = [], {}
    for attention in dict.fromkeys((settings.attention, "eager")):
        for encoding, length in (("alibi", 1), ("sinusoidal", 1), ("sinusoidal", 2)):
            run = Run(encoding, length * settings.length, seed=0)
            model = build_model(run, settings, attention)
            batch = train_tokens[: settings.tokens_per_step].view(-1, run.length).to(settings.device)
            steps[len(costs)] = lambda model=model, batch=batch: train_step(model, batch)
            peak = peak_bytes(steps[len(costs)], settings.device)
            costs.append({"encoding": encoding, "length": run.length, "attention": attention, "peak_bytes": peak})
    seconds = time_steps(steps, ROUNDS, settings.device)
    return [{**cost, "seconds": seconds[number]} for number, cost in enumerate(costs)]
