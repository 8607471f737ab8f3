"""A user who runs `sglang.Engine` himself: BARE A B are checkpoints of one structure, the first without weights."""

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

PROMPT = [5, 17, 42, 8]
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
OPTIONS = {
    "load_format": "dummy",
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "max_total_tokens": 2048,
    "context_length": 256,
    "mem_fraction_static": 0.1,
    "dtype": "bfloat16",
    "sleep_on_idle": True,
}


def answer(engine):
    found = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    return found["output_ids"], found["meta_info"]["weight_version"]


async def update_while_a_request_runs(engine, updater, checkpoint):
    """The update is called from another thread: this one runs the engine's event loop."""
    long = {**GREEDY, "max_new_tokens": 150}
    stream = await engine.async_generate(input_ids=PROMPT, sampling_params=long, stream=True)
    await anext(stream)
    update = asyncio.create_task(asyncio.to_thread(updater.update, checkpoint, version="three"))
    events = [event async for event in stream]
    await update
    found = await engine.async_generate(input_ids=PROMPT, sampling_params=GREEDY)
    return events[-1]["meta_info"]["weight_versions"], found["output_ids"]


def fail_in_the_middle(updater, checkpoint):
    """The source is cut when ranks have begun."""
    from ckpt_core import UpdateAborted
    from ckpt_core.agents import AgentGroup

    start_sending = AgentGroup.start_sending
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "model.safetensors"
        copy.write_bytes((Path(checkpoint) / "model.safetensors").read_bytes())

        def cut_and_send(agents, **options):
            os.truncate(copy, copy.stat().st_size // 2)
            start_sending(agents, **options)

        AgentGroup.start_sending = cut_and_send
        try:
            updater.update(copy, version="cut")
        except UpdateAborted:
            return
        finally:
            AgentGroup.start_sending = start_sending
    raise AssertionError("the update did not fail")


def resume_is_refused(engine):
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput

    request = ContinueGenerationReqInput(torch_empty_cache=False)
    try:
        engine.loop.run_until_complete(engine.tokenizer_manager.continue_generation(request))
    except Exception as error:  # noqa: BLE001 whatever it is, it must say why
        return "not resumed" in str(getattr(error, "detail", error))
    return False


def main():
    import sglang

    from ckpt_core import Undo, UpdateConfig, Updater
    from ckpt_sglang.in_process import target

    bare, first, second = sys.argv[1:]
    engine = sglang.Engine(model_path=bare, **OPTIONS)
    said = {"babble": answer(engine)[0]}
    with Updater(
        [target(engine)], config=UpdateConfig(ring_bytes=1 << 14, bucket_bytes=1 << 13, undo=Undo.NONE)
    ) as updater:
        found = []
        for version, checkpoint in (("one", first), ("two", second)):
            updater.update(checkpoint, version=version)
            found.append(answer(engine))
        said["tokens"], said["versions"] = [list(part) for part in zip(*found, strict=True)]
        work = update_while_a_request_runs(engine, updater, first)
        said["spans"], said["after_async"] = engine.loop.run_until_complete(work)
        fail_in_the_middle(updater, second)
        said["refused"] = resume_is_refused(engine)
        updater.update(second, version="four")
        said["repaired"] = answer(engine)[0]
    engine.shutdown()
    print(json.dumps(said))  # noqa: T201 the test reads it


if __name__ == "__main__":
    main()
