"""A task and rewards that do what the response says; imported by scoring workers, found by import path."""

import asyncio
import os
import time

from megatron_rl.types import Score


class MisbehavingTask:
    name = "misbehaving"
    preload = ()

    def problem(self, row, *, template):
        raise NotImplementedError

    def score(self, problem, response):
        answer = problem.answer
        verb, _, argument = response.partition(" ")
        if verb == "sleep":
            time.sleep(float(argument))
        elif verb == "hold":  # the GIL, in C code that looks for no signal
            sum(range(10**12))
        elif verb == "raise":
            raise RuntimeError(argument)
        elif verb == "quit":
            raise SystemExit(3)
        elif verb == "exit":
            time.sleep(0.2)  # see ScoringPool.score: a death at once may pass for a timeout
            os._exit(int(argument))
        elif verb == "kill":
            time.sleep(0.2)
            os.kill(os.getpid(), int(argument))
        elif verb == "recurse":
            return self.score(problem, response)
        elif verb == "memory":
            raise MemoryError
        elif verb == "none":
            return None
        elif verb == "nan":
            return Score(float("nan"))
        elif verb == "text":
            return Score(argument)
        elif verb == "pid":
            time.sleep(0.001)
            return Score(float(os.getpid()))
        elif verb == "modules":
            import sys

            return Score(float(sum(name in sys.modules for name in argument.split())))
        return Score(float(answer == response), reason="correct" if answer == response else "wrong")


TASK = MisbehavingTask()


def reward(problem, response):
    """Do what the task does, but return a float where that returns a Score; a number is the reward."""
    try:
        return float(response)
    except ValueError:
        score = TASK.score(problem, response)
        return score if score is None else score.reward


def reward_of_metadata(problem, response):
    return Score(problem.metadata["points"][response], {"correct": 1.0}, reason=problem.question)


def numpy_reward(problem, response, scale=1.0):
    import numpy

    return numpy.float32(response) * scale


def only_answer(answer): ...


def by_place(response, /): ...


def one_and_many(responses, answer): ...


def exact(response, answer):
    return {"reward": float(response == answer), "length": len(response), "reason": "as asked"}


def of_verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth) - extra_info["index"], "acc": solution_str == ground_truth}


def of_trl(completions, answers, level, **kwargs):
    assert {"prompts", "other"} <= set(kwargs)
    return [float(c == a) * n for c, a, n in zip(completions, answers, level)]


def of_trl_chat(prompts, completions, **kwargs):
    return [float(prompt[0]["content"] == turns[0]["content"]) for prompt, turns in zip(prompts, completions)]


def one_too_few(responses):
    return [1.0] * (len(responses) - 1)


def none_may_be(responses):
    if "bad" in responses:
        raise ValueError("bad")
    return [1.0] * len(responses)


async def slow_one(response):
    await asyncio.sleep(float(response))
    return 1.0


async def slow_all(responses):
    await asyncio.sleep(0.2)
    return list(map(float, responses))


def scaled(response, finish_reason, scale):
    return scale * float(response) if finish_reason == "stop" else -1.0


def unknown_column(response, difficulty):
    return difficulty


async def asynchronous(problem, response): ...


class NotAFunction: ...


NUMBER = 3
