"""What is no checkpoint: named for what it is, with the command that fetches or converts it, and never executed."""

import json
import pickle
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.errors import CheckpointError
from export.checkpoint.reader import INDEX, SINGLE, open_checkpoint
from tests.support.cases import refused
from tests.support.checkpoints import edit, rewrite

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 12345678\n"
Q = "model.transformer.blocks.1.q_proj.weight"


def message(path: str | Path, *words: str) -> str:
    """The error about `path`, which has all `words`."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    found = str(caught.value)
    assert all(word in found for word in words), found
    assert "\n" not in found and "; " in found
    return found


def run_remedy(text: str) -> None:
    """Run the command at the end of an error's message."""
    command = shlex.split(text[text.index(" with: ") + len(" with: ") :])
    subprocess.run([sys.executable, *command[1:]] if command[0] == "python" else command, check=True, timeout=60)


# Paths


@pytest.mark.parametrize(
    ("given", "name"),
    [("GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Instruct"), ("someone/a_model.v2", "someone/a_model.v2"),
     ("https://huggingface.co/GSAI-ML/LLaDA-V", "GSAI-ML/LLaDA-V"), ("hf.co/a/b", "a/b"), ("hf://a/b", "a/b"),
     ("https://huggingface.co/a/b/tree/main", "a/b"), ("https://huggingface.co/a/b.git", "a/b")],
)  # fmt: skip
def test_a_name_of_the_hub(given: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = name.split("/")[1]
    text = message(given, "a name on the Hugging Face hub")
    assert text.endswith(f"download it with: hf download {name} --local-dir {folder}")
    assert message(Path(given)).endswith(f"hf download {name} --local-dir {folder}")
    (tmp_path / folder).mkdir()
    assert message(given).endswith(f"hf download {name} --local-dir {folder}-original"), "nothing is mixed"


def test_a_path_that_is_mistyped_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for given in ("checkpoints/lada", "nowhere", "a/b/c", "/abs/olute", "../x", "a b/c", "x" * 300):
        assert "hub" not in message(given, "is not a directory; give the folder that holds config.json")


def test_a_file_of_the_checkpoint(single: Path) -> None:
    for name in ("config.json", SINGLE):
        assert message(single / name, "is a file").endswith(f"use {single}")


def test_a_folder_too_high(single: Path, tmp_path: Path) -> None:
    parent = tmp_path / "run"
    shutil.copytree(single, parent / "checkpoint-20")
    assert message(parent, "config.json is missing").endswith(f"use {parent / 'checkpoint-20'}")
    cache = tmp_path / "models--GSAI-ML--LLaDA-8B-Base"
    shutil.copytree(single, cache / "snapshots" / "0123")
    assert message(cache, "a hub's cache").endswith(f"use {cache / 'snapshots' / '0123'}")
    shutil.copytree(single, cache / "snapshots" / "4567")
    for current in ("0123", "4567"):
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / "main").write_text(current)
        assert message(cache).endswith(f"use {cache / 'snapshots' / current}")
    (cache / "snapshots" / "0123" / SINGLE).unlink()
    assert message(cache / "snapshots" / "0123").endswith("download it again with: hf download GSAI-ML/LLaDA-8B-Base")


def test_a_bundle(single: Path) -> None:
    (single / SINGLE).unlink()
    (single / "manifest.json").write_text("{}")
    message(single, "is a bundle, expected a checkpoint")


# Files in place of others


@pytest.mark.parametrize(
    "name", [SINGLE, "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
             "chat_template.jinja", "generation_config.json"],
)  # fmt: skip
def test_pointers_of_git_lfs(single: Path, name: str) -> None:
    """Also those that only a later step reads: a build of them would fail, or not be the model."""
    (single / name).write_text(POINTER)
    assert message(single, f"{name} is a Git LFS pointer").endswith("download or save the checkpoint again")
    (single / ".git").mkdir()
    assert message(single).endswith(f"fetch the files with: git -C {single} lfs pull")


def test_pointers_that_no_build_reads(single: Path) -> None:
    for name in ("figure.png", "pytorch_model.bin"):
        (single / name).write_text(POINTER)
    assert open_checkpoint(single)
    (single / SINGLE).unlink()
    message(single, "pytorch_model.bin is a Git LFS pointer")


def test_a_pointer_in_a_folder_of_a_published_name(single: Path, tmp_path: Path) -> None:
    folder = single.rename(tmp_path / "LLaDA-1.5")
    (folder / SINGLE).write_text(POINTER)
    assert message(folder).endswith(f"hf download GSAI-ML/LLaDA-1.5 --local-dir {folder}")


def test_a_web_page(single: Path) -> None:
    (single / "config.json").write_text("\n<!DOCTYPE html>\n<html></html>")
    message(single, "config.json is a web page, saved in place of the file")


# Layouts of files


@pytest.mark.parametrize(
    "name", ["model-00001-of-00001.safetensors", "pytorch_model.safetensors", "weights.safetensors"]
)
def test_one_file_of_another_name(single: Path, name: str) -> None:
    wanted = open_checkpoint(single).identity
    (single / SINGLE).rename(single / name)
    run_remedy(message(single, f"a single file {name}", "rename it with: mv "))
    assert open_checkpoint(single).identity == wanted


def test_shards_without_an_index(sharded: Path) -> None:
    wanted = open_checkpoint(sharded).identity
    (sharded / INDEX).unlink()
    run_remedy(message(sharded, "all 4 shards"))
    assert open_checkpoint(sharded).identity == wanted


def test_a_shard_without_the_others(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    for number in (1, 3, 4):
        (sharded / f"model-{number:05d}-of-00004.safetensors").unlink()
    message(sharded, "of 4 shards 1, 3, 4 are missing", "download or save the checkpoint again")


@pytest.mark.parametrize(
    ("name", "kind"), [("tf_model.h5", "TensorFlow"), ("flax_model.msgpack", "Flax"), ("__0_0.distcp", "PyTorch's DCP")]
)
def test_weights_of_other_frameworks(single: Path, name: str, kind: str) -> None:
    (single / SINGLE).rename(single / name)
    message(single, kind, "save_pretrained()")


@pytest.mark.slow
def test_double_precision(single: Path, sharded: Path) -> None:
    wanted = open_checkpoint(single).identity
    rewrite(single, lambda tensors: tensors.update({name: tensor.double() for name, tensor in tensors.items()}))
    run_remedy(message(single, "stored as F64", "convert it with: python -c"))
    assert open_checkpoint(single).identity == wanted


# Adapters


LORA = {f"base_model.model.{Q.removesuffix('.weight')}.lora_{x}.weight": torch.ones(4, 32) for x in "AB"}


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_alone(single: Path, config: bool) -> None:
    (single / SINGLE).unlink()
    save_file(LORA, single / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Base", "r": 4}
    (single / "adapter_config.json").write_text(json.dumps(settings))
    if not config:
        (single / "config.json").unlink()
    text = message(single, "holds a LORA adapter alone", "into GSAI-ML/LLaDA-8B-Base, whose own code this runs")
    code, *arguments = shlex.split(text[text.index("python -c") :])[2:]
    compile(code, "remedy", "exec")
    assert "merge_and_unload" in code
    assert arguments == ["GSAI-ML/LLaDA-8B-Base", str(single), "GSAI-ML/LLaDA-8B-Base", "single-merged"]
    (single / "tokenizer_config.json").write_text("{}")
    assert message(single).endswith(f" {single} {single} single-merged"), "its own tokenizer, where it has one"


def test_adapters_that_no_command_merges(single: Path) -> None:
    adapter = single / "adapter_config.json"
    adapter.write_text("{}")
    message(single, "beside a model's weights", "move them to a folder of their own")
    (single / SINGLE).unlink()
    message(single, "merge it into the model that it was trained on")
    adapter.write_text('{"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "a/b"}')
    message(single, "PROMPT_TUNING", "cannot be merged")
    for content in ("no JSON", "[]", '{"peft_type": 3, "base_model_name_or_path": "a\\nb"}'):
        adapter.write_text(content)
        message(single, "holds an adapter alone", "merge it into the model that it was trained on")


def test_the_base_of_an_adapter(single: Path, tmp_path: Path) -> None:
    """Where training kept it on another machine: by its published name, or not at all."""
    (single / SINGLE).unlink()
    for base, remedy in (("/mnt/models/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Base"), (str(tmp_path), str(tmp_path))):
        settings = {"peft_type": "LORA", "base_model_name_or_path": base}
        (single / "adapter_config.json").write_text(json.dumps(settings))
        assert message(single).endswith(f'" {remedy} {single} {remedy} single-merged')
    (single / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "/mnt/run 7"}))
    assert message(single).endswith("merge it into /mnt/run 7 with peft")


def test_an_adapter_inside_the_weights(single: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q.replace(".weight", ".base_layer.weight")] = tensors.pop(Q)
        tensors.update(LORA)

    rewrite(single, change)
    message(single, "an adapter that is not merged", "lora_A.weight", "merge_and_unload()")


# Quantised weights


def gptq(tensors: dict[str, torch.Tensor]) -> None:
    base = Q.removesuffix(".weight")
    del tensors[Q]
    tensors |= {
        f"{base}.qweight": torch.zeros(4, 32, dtype=torch.int32),
        f"{base}.qzeros": torch.zeros(1, 4, dtype=torch.int32),
        f"{base}.scales": torch.ones(1, 32).half(),
        f"{base}.g_idx": torch.zeros(32, dtype=torch.int32),
    }


def awq(tensors: dict[str, torch.Tensor]) -> None:
    gptq(tensors)
    del tensors[Q.replace(".weight", ".g_idx")]


def fp8(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {Q: tensors[Q].to(torch.float8_e4m3fn), f"{Q}_scale_inv": torch.ones(1)}


def bare_fp8(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q] = tensors[Q].to(torch.float8_e5m2)


def bnb4(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {Q: torch.zeros(512, 1, dtype=torch.uint8), f"{Q}.absmax": torch.ones(4),
                f"{Q}.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8)}  # fmt: skip


def bnb8(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {Q: tensors[Q].to(torch.int8), Q.replace(".weight", ".SCB"): torch.ones(32)}


@pytest.mark.parametrize(
    ("change", "settings", "name"),
    [(gptq, {"quant_method": "gptq", "bits": 4}, "GPTQ"), (awq, {"quant_method": "awq"}, "AWQ"),
     (fp8, {"quant_method": "fp8"}, "fp8"), (bare_fp8, {"quant_method": "fp8"}, "fp8"),
     (bnb4, {"load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes in 4 bits"),
     (bnb8, {"_load_in_8bit": True, "load_in_8bit": True}, "bitsandbytes in 8 bits"),
     (gptq, {"quant_method": "method-of-tomorrow"}, "method-of-tomorrow"), (gptq, {"kind": 3}, "an unnamed method")],
)  # fmt: skip
def test_quantised_weights(
    single: Path, change: Callable[[dict[str, torch.Tensor]], None], settings: dict[str, Any], name: str
) -> None:
    """With the key of config.json, and by the tensors without it; where the original is known, it is fetched."""
    rewrite(single, change)
    edit(single / "config.json", lambda config: config.update(quantization_config=settings))
    message(single, f"quantised with {name}", "use the checkpoint that it was made from")
    (single / "README.md").write_text("---\nlicense: mit\nbase_model:\n- GSAI-ML/LLaDA-8B-Instruct\n---\n")
    command = "download the original with: hf download GSAI-ML/LLaDA-8B-Instruct --local-dir LLaDA-8B-Instruct"
    assert message(single).endswith(command)
    edit(single / "config.json", lambda config: config.pop("quantization_config"))
    shown = "GPTQ" if change is gptq else name
    assert message(single, "quantised with", shown).endswith(command)


def test_the_original_by_a_name(single: Path, tmp_path: Path) -> None:
    quantised = {"quant_method": "awq"}
    edit(single / "config.json", lambda config: config.update(quantization_config=quantised))
    folder = single.rename(tmp_path / "llada-8b-instruct-AWQ")
    message(folder, "hf download GSAI-ML/LLaDA-8B-Instruct --local-dir LLaDA-8B-Instruct")
    other = folder.rename(tmp_path / "q")
    edit(other / "config.json", lambda config: config.update(_name_or_path="/models/LLaDA-1.5"))
    message(other, "hf download GSAI-ML/LLaDA-1.5 --local-dir LLaDA-1.5")


def gguf(*strings: str) -> bytes:
    """A file that begins as GGUF does and holds `strings`, each behind its length."""
    return b"GGUF\x03\0\0\0" + bytes(16) + b"".join(struct.pack("<Q", len(s)) + s.encode() for s in strings)


def test_gguf(single: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (single / SINGLE).unlink()
    for folder in (alone, single):
        file = folder / "LLaDA-8B-Base.Q4_K_M.gguf"
        file.write_bytes(gguf("general.architecture", "llada"))
        for given in (folder, file):
            text = message(given, "is a GGUF file", "expected a folder of safetensors")
            assert text.endswith("hf download GSAI-ML/LLaDA-8B-Base --local-dir LLaDA-8B-Base")
        file.unlink()
        (folder / "x.gguf").write_bytes(gguf("a"))
        message(folder, "is a GGUF file", "use the checkpoint that it was made from")
        address = "https://huggingface.co/someone/their-model"
        (folder / "x.gguf").write_bytes(gguf("general.base_model.0.repo_url", address, "0" * 48))
        assert message(folder).endswith("hf download someone/their-model --local-dir their-model")


# Pickles


class Bomb:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "last.ckpt", "weights.bin"],
)
def test_pickles_are_never_loaded(sharded: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(sharded / "config.json", tmp_path)
    for file in (name, "training_args.bin", "optimizer.pt"):
        (tmp_path / file).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    text = message(tmp_path, "pickled weights", "weights_only=True", "save_file", shlex.quote(str(tmp_path)))
    assert text.endswith(name) and "training_args" not in text
    assert not (tmp_path / "exploded").exists()
    (tmp_path / name).unlink()
    message(tmp_path, f"holds neither {SINGLE} nor {INDEX}")


@pytest.mark.slow
@pytest.mark.parametrize("nested", [True, False])
def test_the_command_against_pickles_works(sharded: Path, tmp_path: Path, nested: bool) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copy(sharded / "config.json", folder)
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    for name in names:
        tensors = load_file(sharded / name)
        file = folder / name.replace("model", "pytorch_model").replace("safetensors", "bin")
        torch.save({"state_dict": tensors} if nested else tensors, file)
    run_remedy(message(folder))
    wanted, came = open_checkpoint(sharded), open_checkpoint(folder)
    for part in wanted.config.parts:
        assert all(torch.equal(tensor, came.part(part)[local]) for local, tensor in wanted.part(part).items())


def test_unreadable_config(single: Path) -> None:
    (single / "config.json").unlink()
    (single / "config.json").mkdir()
    with refused(CheckpointError, "config.json", "cannot be read"):
        open_checkpoint(single)
