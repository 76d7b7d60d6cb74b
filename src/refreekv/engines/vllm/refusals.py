"""What the plugin cannot serve: one sentence each, before anything runs."""

from typing import Any

from refreekv.engines.vllm.config import CONNECTOR, EXACT, PluginOptions
from refreekv.engines.vllm.launch import installed_version
from refreekv.policies import Policy
from refreekv.policies.base import AUTO
from refreekv.policies.joint import JointPolicy

SUPPORTED = ("0.32", "0.33")
"""vLLM releases the plugin is tested with, by major and minor number."""


def check_version(version: str) -> None:
    """ValueError for a vLLM that the plugin was not tested with."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise ValueError(
            f"refreekv was tested with vLLM {', '.join(SUPPORTED)}, and this is {version}: the scheduler's inner "
            f"workings differ from release to release; install vllm=={SUPPORTED[-1]}.0"
        )


def check_policy(policy: Policy) -> None:
    """ValueError for a policy that decides about all layers together."""
    if isinstance(policy, JointPolicy):
        raise ValueError(
            f"policy {policy.name!r} decides once it has seen all layers, and in vLLM each layer is asked by itself; "
            f"choose another one, such as 'refreekv' or 'adaptive'"
        )


def check_config(vllm_config: Any) -> PluginOptions:
    """The plugin's options in a vLLM configuration that it can serve; ValueError otherwise."""
    check_version(installed_version() or "none")
    return check_settings(vllm_config)


def check_settings(vllm_config: Any) -> PluginOptions:
    """`check_config` without the version."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        name = None if transfer is None else transfer.kv_connector
        raise ValueError(
            f"refreekv needs vLLM's one KV connector for itself, and it is set to {name!r}: KV transfer and offloading "
            f"read whole block tables, which pruned requests no longer have; leave them out"
        )
    options = PluginOptions.of(vllm_config)
    check_policy(options.build())
    check_options(options, on_cpu=vllm_config.device_config.device_type == "cpu")
    for refused, sentence in _refusals(vllm_config):
        if refused:
            raise ValueError(sentence)
    return options


def check_options(options: PluginOptions, *, on_cpu: bool) -> None:
    """ValueError for options that are the other kind of device's."""
    if on_cpu and options.kv_dtype not in (EXACT, AUTO):
        raise ValueError(
            f"kv_dtype={options.kv_dtype!r}: on CPUs vLLM's own kernel reads the KV cache, which knows no codes; "
            f"leave it out, and calibrations that were made with it (calibrate --kv-dtype 16)"
        )
    if on_cpu and options.prefix_hits:
        raise ValueError("prefix_hits: on CPUs policies that probe all over the prompt take no hits; leave it out")
    if not on_cpu and options.layers_per_group != 1:
        raise ValueError(
            f"layers_per_group={options.layers_per_group}: on GPUs all layers share block tables, and each KV head "
            f"keeps what it needs; leave it out"
        )


def _refusals(config: Any) -> list[tuple[bool, str]]:
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    speculation = config.speculative_config
    method = speculation.method if speculation is not None else None
    return [
        (
            model.use_mla,
            "refreekv cannot prune multi-head latent attention (MLA): its cache has no keys per head to probe",
        ),
        (
            model.runner_type != "generate",
            f"refreekv prunes prompts of models that generate, and this one runs as {model.runner_type!r}",
        ),
        (model.is_encoder_decoder, "refreekv cannot prune encoder-decoder models: their cross attention is not causal"),
        (
            cache.cache_dtype != "auto",
            f"refreekv reads keys from the KV cache as the model writes them, and --kv-cache-dtype {cache.cache_dtype} "
            f"quantizes them; leave it at auto",
        ),
        (
            getattr(cache, "kv_offloading_size", None) is not None,
            "refreekv conflicts with KV offloading, which reads whole block tables; leave out --kv-offloading-size",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "refreekv does not support pipeline parallelism yet; use --tensor-parallel-size",
        ),
        *(_on_cpu(config) if config.device_config.device_type == "cpu" else _on_gpu(config)),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "refreekv does not support context parallelism, which shards what it prunes",
        ),
        (parallel.use_ubatching, "refreekv does not support micro-batching; leave out --enable-dbo"),
        (
            method is not None and method not in ("ngram", "suffix"),
            f"refreekv supports n-gram and suffix speculation, which have no KV cache of their own, not {method!r}",
        ),
        (
            bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
            "refreekv needs vLLM's hybrid KV cache manager; leave out --disable-hybrid-kv-cache-manager",
        ),
        (
            bool(cache.kv_sharing_fast_prefill),
            "refreekv cannot prune layers that share another layer's KV cache; leave out --kv-sharing-fast-prefill",
        ),
    ]


def _on_cpu(config: Any) -> list[tuple[bool, str]]:
    return [
        (
            bool(config.use_v2_model_runner),
            "refreekv supports vLLM's V1 model runner only on CPUs; set VLLM_USE_V2_MODEL_RUNNER=0",
        ),
    ]


def _on_gpu(config: Any) -> list[tuple[bool, str]]:
    device, speculation = config.device_config.device_type, config.speculative_config
    mode = config.compilation_config.cudagraph_mode
    return [
        (device != "cuda", f"refreekv supports vLLM on CPUs and on CUDA, and this is {device}"),
        (
            not config.use_v2_model_runner,
            "refreekv supports vLLM's V2 model runner only on CUDA, and this configuration runs on V1: unset "
            "VLLM_USE_V2_MODEL_RUNNER, and leave out what V2 does not know (vLLM's log says what)",
        ),
        (
            mode is not None and mode.name == "FULL",
            "refreekv reads prompts outside of full CUDA graphs; set cudagraph_mode to FULL_AND_PIECEWISE, PIECEWISE "
            "or NONE instead of FULL",
        ),
        (
            speculation is not None and bool(speculation.uses_dynamic_speculative_decoding()),
            "refreekv does not support a number of drafts that changes with the batch",
        ),
    ]


def check_backends(others: list[str]) -> None:
    """ValueError if vLLM chose attention backends that the plugin does not know, named by their builders."""
    if others:
        raise ValueError(
            f"refreekv reads the KV cache of FLASH_ATTN and TRITON_ATTN, and vLLM chose a backend with "
            f"{' and '.join(sorted(set(others)))}; set --attention-backend FLASH_ATTN or TRITON_ATTN"
        )


def check_attention(modules: dict[str, Any], specs: dict[str, Any], queries: int, most: int) -> None:
    """ValueError for attention layers that the kernel over kept entries does not compute.

    Parameters
    ----------
    modules : dict
        vLLM's attention layers by name.
    specs : dict
        KV cache specs of those that are pruned.
    queries : int
        Most queries of a request in a decode step, drafts among them.
    most : int
        Queries by query heads of a KV head that the kernel takes.
    """
    shared = [name for name, module in modules.items() if getattr(module, "kv_sharing_target_layer_name", None)]
    if shared:
        raise ValueError(
            f"refreekv cannot prune models in which layers share another layer's KV cache, and {len(shared)} do here "
            f"(first: {shared[0]})"
        )
    for name, spec in specs.items():
        impl = modules[name].impl
        if getattr(spec, "head_size_v", None) not in (None, spec.head_size):
            raise ValueError(
                f"refreekv needs keys and values of one size in vLLM, and {name} has {spec.head_size} and "
                f"{spec.head_size_v}"
            )
        if getattr(impl, "alibi_slopes", None) is not None or getattr(spec, "attention_chunk_size", None):
            raise ValueError(
                f"refreekv computes plain causal attention over what is kept, and {name} has ALiBi slopes or looks at "
                f"a chunk of the context"
            )
        group = impl.num_heads // impl.num_kv_heads
        if queries * group > most:
            raise ValueError(
                f"refreekv takes at most {most // group} tokens of a request in a step with {group} query heads a KV "
                f"head, and drafts make them {queries}; lower num_speculative_tokens"
            )


def check_layers(
    specs: dict[str, Any], prunable: list[str], layers_per_group: int, beside: tuple[type, ...] = ()
) -> None:
    """ValueError unless layers have full attention, or are of one of the kinds that may be beside, and groups are even.

    Parameters
    ----------
    specs : dict
        KV cache specs by layer.
    prunable : list of str
        Layers with full attention.
    layers_per_group : int
        Of those, that share a block table.
    beside : tuple of type
        Specs of layers that stay as they are.
    """
    if not prunable:
        raise ValueError("refreekv found no layer with full attention in this model: there is nothing it could prune")
    others = [name for name in specs if name not in prunable and not isinstance(specs[name], beside)]
    if others:
        kinds = sorted({type(specs[name]).__name__ for name in others})
        may = "other layers than those with full attention or sliding windows" if beside else "hybrid models"
        raise ValueError(
            f"refreekv does not prune {may} in vLLM yet, and {len(others)} of {len(specs)} layers here have "
            f"{' and '.join(kinds)} (first: {others[0]}); transformers models are pruned by refreekv.compress"
        )
    if len(prunable) % layers_per_group:
        even = [number for number in range(1, len(prunable) + 1) if len(prunable) % number == 0]
        raise ValueError(
            f"layers_per_group={layers_per_group} does not divide the model's {len(prunable)} layers evenly, which "
            f"would waste memory; choose one of {even}"
        )


def check_groups(pruned: int, layers: int) -> None:
    """ValueError unless vLLM put all layers that are pruned into one group."""
    if pruned != 1:
        raise ValueError(
            f"refreekv needs this model's {layers} layers with full attention in one KV cache group, and vLLM made "
            f"{pruned} of them, as there are fewer layers of another kind"
        )


def check_heads(model_config: Any, ranks: int) -> None:
    """ValueError if tensor parallelism would hold a KV head on several ranks, which would then count more than once."""
    heads = model_config.get_total_num_kv_heads()
    if ranks > 1 and heads % ranks:
        raise ValueError(
            f"refreekv needs the model's {heads} KV heads to be split evenly over {ranks} tensor-parallel ranks"
        )
