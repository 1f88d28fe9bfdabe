"""What a Generate call of vLLM's protocol asks for."""

from __future__ import annotations

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from services.router.generation import Sampling
from services.router.grpc.engines.vllm import generation_request
from services.router.messages import merged_sampling


def sampling(asked: vllm.SamplingParams) -> Sampling:
    """What is sampled with where the model has defaults of its own."""
    asked_for = generation_request(vllm.GenerateRequest(text="a", sampling_params=asked)).sampling
    return merged_sampling(asked_for, Sampling(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.2))


def test_zeros_are_off_and_not_the_models_defaults() -> None:
    found = sampling(vllm.SamplingParams())
    assert (found.top_p, found.top_k, found.min_p, found.repetition_penalty) == (1.0, 0, 0.0, 1.0)
    assert found.temperature == 0.6, "the one field that can be left out"


def test_values_are_taken_as_they_stand() -> None:
    found = sampling(vllm.SamplingParams(temperature=0.0, top_p=0.5, top_k=7, min_p=0.25, repetition_penalty=1.5))
    assert (found.temperature, found.top_p, found.top_k, found.min_p, found.repetition_penalty) == (0.0, 0.5, 7, 0.25, 1.5)
