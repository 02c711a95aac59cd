"""One run: builds what the loops of train.py use, and does what surrounds a step (metrics, evaluation, checkpoints)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_rl import watchdog
from megatron_rl.algorithms import build_algorithm
from megatron_rl.algorithms.base import OnlineAlgorithm
from megatron_rl.config import Config, save_resolved
from megatron_rl.convert.random_weights import RandomReader
from megatron_rl.convert.reader import HFReader
from megatron_rl.convert.shape import read_shape
from megatron_rl.curves import plot_curves
from megatron_rl.data.origin import digest_of_fingerprints, random_model_digest, tokenizer_digest, weight_fingerprints
from megatron_rl.data.pack import pack_layout, too_long
from megatron_rl.data.pool import Pool
from megatron_rl.data.prompts import demonstrations, tokenize_prompts
from megatron_rl.data.stream import Stream
from megatron_rl.data.tokenizer import load_tokenizer, stop_ids
from megatron_rl.distance import distance_metrics, probe_rows
from megatron_rl.errors import UserError
from megatron_rl.evaluate import EvalResults, Evaluator, keep_and_explore_rates, results_path, save_results
from megatron_rl.measure import rollout_metrics, sample_metrics, update_metrics
from megatron_rl.metrics import MetricsLogger, PhaseTimer, build_sinks
from megatron_rl.model.build import build_groups_of
from megatron_rl.model.checkpoint import Checkpoints, fixed_settings
from megatron_rl.model.step import Policy
from megatron_rl.model.weights import export_hf, load_hf_weights
from megatron_rl.parallel.agree import all_ranks_agree, broadcast_json, gather_json
from megatron_rl.rollout.collect import Collector
from megatron_rl.rollout.engine import RolloutEngine
from megatron_rl.rollout.recorded import RecordedEngine, RecordingEngine
from megatron_rl.rollout.score import Scorer
from megatron_rl.rollout.sglang.flags import check_kv_pool
from megatron_rl.rollout.transformers_engine import TransformersEngine
from megatron_rl.runtime import Runtime
from megatron_rl.summary import print_before_after, write_summary
from megatron_rl.tasks import get_task
from megatron_rl.types import Prompt, RolloutGroup, TrainingSample
from megatron_rl.weight_sync.publish import WeightSync, served_overrides


class Run:
    """Everything of one run on this rank. Every rank builds the same; what is shared out is inside the parts."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.started = time.monotonic()
        self.directory = config.exp_manager.run_dir
        self.is_first = runtime.rank == 0
        self.timer = PhaseTimer(
            synchronize=torch.cuda.synchronize if runtime.device.type == "cuda" else None, on_border=watchdog.enter
        )
        self._checkpoint_seconds: dict[str, float] = {}
        torch.manual_seed(config.trainer.seed)
        self.groups = build_groups_of(config, runtime.device)
        with all_ranks_agree(self.groups.cpu_group):
            self.shape = read_shape(Path(config.policy.model_path))
            self.tokenizer = load_tokenizer(self._tokenizer_dir, self.shape)
            self._stop_ids = stop_ids(self.tokenizer, self.shape)
            self._load_data()
        self.algorithm = build_algorithm(config)
        self._open_pools()
        with ExitStack() as parts:  # what is started is stopped again, also when a later part cannot be built
            self._build(parts)
            self._parts = parts.pop_all()

    def _build(self, parts: ExitStack) -> None:
        config = self.config
        # First of all, because servers take long to start; they do while the policy is built.
        engine = self._build_engine() if config.trainer.stage == "rl" or config.eval.is_used else None
        if engine is not None:
            parts.callback(engine.close)
        self.policy = Policy(config, self.shape, self.groups, fill_weights=self._fill_weights, timer=self.timer)
        self.reference = self.policy.snapshot() if self.algorithm.needs_reference else []
        self.checkpoints = Checkpoints(
            self.directory / "checkpoints",
            keep_last=config.exp_manager.checkpoint_callback_params.keep_last,
            groups=self.groups,
            say=self.say,
        )
        self.start_step = self._resume()
        self.logger = self._build_logger()
        parts.callback(self.logger.close)
        self.collector: Collector | None = None
        if engine is not None:
            scorer = self._build_scorer()
            parts.callback(scorer.close)
            self.collector = Collector(engine, scorer, config.trainer.seed, self.timer)
        self._weight_sync = WeightSync(config, self.policy)
        if config.trainer.stage == "rl":
            self.publish(version=self.start_step)

    # ------------------------------------------------------------------------------------------------ around a step

    def steps(self) -> Iterator[int]:
        """The steps still to do, counted from 0."""
        for step in range(self.start_step, self.config.trainer.max_steps):
            self.timer.flush()
            self._step_started = time.monotonic()
            watchdog.set_step(step + 1)
            yield step

    def finish_step(
        self,
        done: int,
        updates: Sequence[Mapping[str, float]],
        samples: Sequence[TrainingSample],
        groups: Sequence[RolloutGroup] = (),
    ) -> None:
        """Log a step; evaluate and save where it is time to.

        Args:
            done: steps done, this one included.
            updates: what each ``train_step`` returned.
            samples: the rows trained on.
            groups: the rollouts of an online step.
        """
        metrics = update_metrics(updates) | sample_metrics(samples)
        if groups:
            metrics |= rollout_metrics(groups, version=done - 1)
            metrics |= self.online_algorithm.step_metrics() | self.rollouts.engine.metrics()
        seconds = time.monotonic() - self._step_started
        metrics |= self.timer.flush(seconds) | self._checkpoint_seconds
        if self.reference:
            metrics["memory/reference_bytes"] = float(sum(weight.nbytes for weight in self.reference))
        self._checkpoint_seconds = {}
        metrics["tokens_per_s"] = metrics["num_tokens"] / seconds
        with all_ranks_agree(self.groups.cpu_group):  # rank 0 writes, and its disk may be full
            self.logger.log(done, metrics)
        every, last = self.config.eval.every_n_steps, self.config.trainer.max_steps
        if done == last and self.config.eval.after:
            self._evaluate(done, self.config.eval.num_samples)
        elif every and done % every == 0:
            self._evaluate(done, self.config.eval.num_samples_during)
        self._save_if_due(done)

    def samples(self, groups: Sequence[RolloutGroup], step: int) -> list[TrainingSample]:
        """The rows of a step; where stored ones cannot be read, all ranks end alike."""
        with all_ranks_agree(self.groups.cpu_group):
            return self.online_algorithm.samples(groups, step)

    @property
    def online_algorithm(self) -> OnlineAlgorithm:
        """The algorithm of an online run."""
        assert isinstance(self.algorithm, OnlineAlgorithm)
        return self.algorithm

    @property
    def rollouts(self) -> Collector:
        """What samples and scores; there is none in a supervised run without evaluation."""
        assert self.collector is not None
        return self.collector

    def evaluate_before(self) -> None:
        """Evaluate the model as it comes, as step 0."""
        if self.config.eval.before and self.start_step == 0:
            self._evaluate(0, self.config.eval.num_samples)

    def rest_engine(self) -> None:
        """The next rollouts are a training phase away: a colocated engine gives its memory to the trainer."""
        with self.timer("weight_sync"):
            self.rollouts.engine.release_memory()

    def publish(self, *, version: int) -> None:
        """Give the engine the current weights."""
        with self.timer("weight_sync"):
            self.rollouts.engine.resume_memory()
        self._weight_sync.publish(self.rollouts.engine, version=version)

    @watchdog.phase("finish")
    def finish(self) -> None:
        """Export, plot, sum up."""
        if self.config.exp_manager.export_hf:
            source = Path(self.config.policy.model_path)
            target = self.directory / "hf"
            export_hf(self.policy.chunks, self.shape, self.groups, source=source, target=target)
            self.say(f"Hugging Face checkpoint: {target}")
        self.logger.close()
        if self.is_first:
            plot_curves(self.logger.path, self.directory / "curves.png")
            self._sum_up(self.logger.rows())

    def say(self, message: str) -> None:
        """One line for the user, from rank 0."""
        if self.is_first:
            print(message, flush=True)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    # ------------------------------------------------------------------------------------------------ parts

    @property
    def _tokenizer_dir(self) -> Path:
        return Path(self.config.policy.tokenizer_path or self.config.policy.model_path)

    def _load_data(self) -> None:
        data, context = self.config.data, self.shape.max_position_embeddings
        task = get_task(data.task)

        def load(file: str, max_new_tokens: int) -> list[Prompt]:
            problems = task.load(Path(file), template=data.template)
            prompts, dropped = tokenize_prompts(
                problems,
                self.tokenizer,
                data,
                context_length=context,
                max_new_tokens=max_new_tokens,
                field="data.train" if file == data.train else "data.validation",
            )
            if dropped:
                self.say(f"{file}: {dropped} of {len(problems)} problems left out, their prompts are too long")
            return prompts

        seed, new_tokens = self.config.trainer.seed, self.config.rollout.max_new_tokens
        if self.config.trainer.stage == "rl":
            self.prompts: Stream[Prompt] = Stream(load(data.train, new_tokens), seed, data.shuffle)
            self.stream: Stream[Any] = self.prompts
        else:
            rows = demonstrations(
                load(data.train, 1),
                self.tokenizer,
                stop_id=self._stop_ids[0],
                context_length=context,
                overlong=data.overlong_prompts,
            )
            self.demonstrations: Stream[TrainingSample] = Stream(rows, seed, data.shuffle)
            self.stream = self.demonstrations
        self._check_budget()
        if self.config.eval.is_used:
            assert data.validation is not None
            self.evaluator = Evaluator(
                load(data.validation, new_tokens)[: self.config.eval.num_problems], self.config.eval, new_tokens
            )
            # Read now, so that a wrong file is found before training; by rank 0, whose own disk it may be on.
            self._baseline = self.evaluator.read_baseline() if self.is_first else None

    def _open_pools(self) -> None:
        """Stored samples to train on, and to measure forgetting by."""
        need = self.online_algorithm.pool_need if self.config.trainer.stage == "rl" else None
        probed = self.config.eval.pool if self.config.eval.is_used else None
        model = self.model_digest() if need is not None and need.of_this_model else None
        self._probes: list[TrainingSample] = []
        self._pool_digest: dict[str, tuple[str, str]] = {}
        with all_ranks_agree(self.groups.cpu_group):
            if need is not None:
                pool = Pool(need.directory, model_digest=model, tokenizer_digest=tokenizer_digest(self.tokenizer))
                self.say(self.online_algorithm.use_pool(pool, self.prompts.items))
                self._pool_digest[need.field] = (need.directory, pool.digest())
            if probed is not None:
                pool = Pool(probed, tokenizer_digest=tokenizer_digest(self.tokenizer))
                self._probes = probe_rows(pool, self.config)

    @property
    def _row_unit(self) -> int:
        """So many rows give every data-parallel rank as many micro-batches as its schedule takes at a time."""
        policy = self.config.policy
        in_flight = policy.pipeline_parallel_size if policy.virtual_pipeline_size > 1 else 1
        return self.config.data_parallel_size * in_flight

    def model_digest(self) -> str:
        """Of the weights that the policy starts from. A collective: ranks share the reading out."""
        policy, groups = self.config.policy, self.groups
        directory, is_random = Path(policy.model_path), policy.initialization == "random"
        with all_ranks_agree(groups.cpu_group):
            if is_random:
                return random_model_digest(directory, self.config.trainer.seed)
            mine = weight_fingerprints(directory, rank=groups.rank, num_ranks=groups.world_size)
        return digest_of_fingerprints(gather_json(mine, groups.cpu_group))

    def _check_budget(self) -> None:
        """A row that no micro-batch has room for is found before anything is built."""
        if self.config.trainer.stage == "rl":
            longest = max(len(p.prompt_ids) for p in self.prompts.items) + self.config.rollout.max_new_tokens
        else:
            longest = max(row.num_tokens for row in self.demonstrations.items)
        policy = self.config.policy
        longest = pack_layout(policy).padded(longest)
        if longest > policy.train_micro_batch_tokens:
            raise too_long(longest, policy.train_micro_batch_tokens)
        # Groups get as many replays as there are, so a rank can have one row more than another: it shares a micro-batch.
        is_uneven = self.config.algorithm.name == "rlep" and self._row_unit > 1
        if is_uneven and 2 * longest > policy.train_micro_batch_tokens:
            raise UserError(
                "policy.train_micro_batch_tokens",
                policy.train_micro_batch_tokens,
                f"must have room for two of the longest rows, of {longest} tokens each, under replay",
                f"use {2 * longest} or more, or shorter prompts and responses",
            )

    def _fill_weights(self, chunks: Any) -> None:
        policy, seed = self.config.policy, self.config.trainer.seed
        is_random = policy.initialization == "random"
        load_hf_weights(
            chunks,
            self.shape,
            self.groups,
            lambda: RandomReader(self.shape, seed=seed) if is_random else HFReader(Path(policy.model_path)),
        )

    def _resume(self) -> int:
        manager = self.config.exp_manager
        with all_ranks_agree(self.groups.cpu_group):
            if self.is_first:
                save_resolved(self.config, self.directory / "config.yaml")
        self._fixed = fixed_settings(self.config, self.shape, self._pool_digest)
        path, step = self.checkpoints.find(manager.resume_from_checkpoint, is_resuming=manager.resume_if_exists), 0
        if path is not None:
            state = self.checkpoints.load(path, self.policy, self._fixed)
            self.stream.load_state(state)
            if isinstance(self.algorithm, OnlineAlgorithm):
                self.algorithm.load_state(self.checkpoints.load_tensors(path))
            step = int(state["step"])
            self.say(f"resuming after step {step}: {path}")
        if manager.create_checkpoint_callback:
            self.checkpoints.set_aside_others(path)
        return step

    @watchdog.phase("checkpoint")
    def _save_if_due(self, done: int) -> None:
        manager = self.config.exp_manager
        is_due = (
            done % manager.checkpoint_callback_params.every_n_train_steps == 0 or done == self.config.trainer.max_steps
        )
        if manager.create_checkpoint_callback and is_due:
            started = time.monotonic()
            state = {"step": done, "fixed": self._fixed, **self.stream.state()}
            is_online = isinstance(self.algorithm, OnlineAlgorithm)
            kept = self.online_algorithm.state() if is_online else {}
            path = self.checkpoints.save(done, self.policy, state, kept)
            # In the row of the next step: this step's has to be on disk before its checkpoint is.
            self._checkpoint_seconds = {"time/checkpoint_s": time.monotonic() - started}
            self.say(f"checkpoint {path} ({self._checkpoint_seconds['time/checkpoint_s']:.1f} s)")

    def _build_logger(self) -> MetricsLogger:
        with all_ranks_agree(self.groups.cpu_group):
            manager, steps = self.config.exp_manager, self.config.trainer.max_steps
            sinks = build_sinks(manager, self.directory, run_config=asdict(self.config)) if self.is_first else ()
            logger = MetricsLogger(self.directory, total_steps=steps, sinks=sinks, is_writer=self.is_first)
            # A fresh run starts without rows; a resumed one keeps those up to its checkpoint.
            logger.resume_at(self.start_step if self.start_step else -1)
        return logger

    def _build_engine(self) -> RolloutEngine:
        rollout = self.config.rollout
        if rollout.recorded_dir is not None:
            return RecordedEngine(Path(rollout.recorded_dir))
        model_path, device, group = Path(self.config.policy.model_path), self.runtime.device, self.groups.cpu_group
        dtype = torch.bfloat16 if self.config.trainer.precision == "bf16" else torch.float32
        engine: RolloutEngine
        if rollout.engine == "sglang":
            from megatron_rl.rollout.sglang.driver import ServedModel  # needs aiohttp
            from megatron_rl.rollout.sglang.engine import SGLangEngine

            self._check_kv_pool()
            replay = self.config.policy.router_replay
            served = ServedModel(
                model_path,
                self.shape,
                dtype,
                tuple(self._stop_ids),
                records_experts=replay,
                overrides=served_overrides(self.config, self.shape),
            )
            engine = SGLangEngine(self.config, served, device=device, cpu_group=group)
        else:
            pad_id = self.tokenizer.pad_token_id
            engine = TransformersEngine(
                model_path,
                dtype=dtype,
                device=device,
                stop_ids=self._stop_ids,
                pad_id=self._stop_ids[0] if pad_id is None else pad_id,
                max_batch_size=rollout.max_batch_size,
                cpu_group=group,
            )
        if not rollout.record:
            return engine
        agree = partial(all_ranks_agree, group)
        return RecordingEngine(engine, self.directory / "rollouts", is_writer=self.is_first, agree=agree)

    def _check_kv_pool(self) -> None:
        """A request that never fits a server's cache is found before the servers are started."""
        streams = [self.prompts.items] if self.config.trainer.stage == "rl" else []
        longest = max(len(p.prompt_ids) for prompts in (*streams, self._held_out) for p in prompts)
        check_kv_pool(
            self.config.rollout.sglang_cfg,
            is_cpu=self.runtime.device.type == "cpu",
            longest_request=longest + self.config.rollout.max_new_tokens,
        )

    @property
    def _held_out(self) -> Sequence[Prompt]:
        return self.evaluator.prompts if self.config.eval.is_used else []

    def _build_scorer(self) -> Scorer:
        data = self.config.data
        return Scorer(
            data.task,
            self.tokenizer,
            num_workers=data.num_scoring_workers,
            timeout_s=data.scoring_timeout_s,
            cpu_group=self.groups.cpu_group,
        )

    @watchdog.phase("evaluation")
    def _evaluate(self, done: int, num_samples: int) -> None:
        started = time.monotonic()
        distance: dict[str, float] = {}
        if self._probes:
            self.rest_engine()  # a pass of the trainer, which needs the memory of a colocated engine
            distance = distance_metrics(self.policy, self._probes, batch_size=self._row_unit)
        if self._probes or self.rollouts.engine.weight_version != done:
            self.publish(version=done)
        evaluation = self.evaluator.evaluate(self.rollouts, step=done, num_samples=num_samples)
        self.timer.flush()  # evaluation has its own figure and does not count into a step
        metrics = evaluation.metrics | self._keep_and_explore(evaluation.results) | distance
        with all_ranks_agree(self.groups.cpu_group):
            if self.is_first:
                save_results(self.directory, evaluation.results)
            self.logger.log_eval(done, metrics | {"eval/seconds": time.monotonic() - started})

    def _keep_and_explore(self, results: EvalResults) -> dict[str, float]:
        """Against ``eval.baseline``, else this run's step 0. Rank 0 has the files, every rank gets the rates."""
        rates: dict[str, float] = {}
        if self.is_first:
            baseline = self._baseline
            # Without the row, a file of step 0 is of another run, which had this folder before.
            if baseline is None and any(row["step"] == 0 for row in self.logger.rows()):
                try:
                    baseline = self.evaluator.read_results(results_path(self.directory, 0), field="eval")
                except UserError as error:  # no reason to end a run that was resumed with other problems
                    self.say(f"no keep and explore rates: {error}")
            rates = {} if baseline is None else keep_and_explore_rates(baseline, results)
        return broadcast_json(rates, self.groups.cpu_group)

    def _sum_up(self, rows: Sequence[Mapping[str, float]]) -> None:
        by_step = {int(row["step"]): row for row in rows}
        before, after = by_step.get(0, {}), by_step.get(self.config.trainer.max_steps, {})
        names = {"greedy": "eval/greedy"} | {f"pass{k}": f"eval/pass@{k}" for k in self.config.eval.k_values}
        kept = ("eval/keep_rate", "eval/explore_rate", "eval/distinct", "eval/style")
        names |= {key.removeprefix("eval/"): key for key in after if key.startswith(kept)}
        summary: dict[str, Any] = {"engine": self.config.rollout.engine, "steps": self.config.trainer.max_steps}
        for when, row in (("before", before), ("after", after)):
            summary |= {f"{name}_{when}": row[key] for name, key in names.items() if key in row}
        phases = sorted({key for row in rows for key in row if key.startswith("time/")} | {"eval/seconds"})
        summary["seconds_by_phase"] = {key: round(sum(row.get(key, 0.0) for row in rows), 3) for key in phases}
        summary["seconds"] = round(time.monotonic() - self.started, 3)
        write_summary(self.directory / "summary.json", summary)
        if before and after:
            print_before_after(before, after, self.config.eval.k_values)
