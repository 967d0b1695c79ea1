"""A reader's own words: the command, the page, the film. The page is tried in a real Chromium,
where there is one."""

import base64
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import probe
from chapters import figures, page
from data.common import UserError
from data.runs import read_film
from model import record
from tests import browser
from tests.tiny import tiny_llama_folder, tiny_model, tokens, with_tokenizer

IDS = tokens(1, 12)[0].tolist()


def unpacked(text) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def numbers_of(path) -> dict:
    """What a page holds, read back: the content of `write`, with pattern (S, L, H, T,
    T) and length (S, L, T) of all states."""
    text = Path(path).read_text(encoding="utf-8")
    begin = text.index('type="application/json">') + len('type="application/json">')
    found = json.loads(text[begin:text.index("</script>", begin)])
    S, L, H, T = (len(found["states"]), found["layers"], found["heads"],
                  len(found["words"]))
    maps = np.frombuffer(unpacked(found["maps"]), np.uint8).reshape(S, L, H, -1).copy()
    maps[1:] += maps[0]
    pattern = np.zeros((S, L, H, T, T))
    pattern[..., np.tril(np.ones((T, T), bool))] = maps / 255
    length = np.frombuffer(unpacked(found["lengths"]), "<f4").reshape(S, L, T)
    return found | {"pattern": pattern, "length": length}


def prompt(attn="softmax"):
    model = tiny_model(attn)
    return probe.Prompt("tiny", model, IDS, lambda ids: f" w{ids[0]}")


# ---------------------------------------------------------------- what is read

@pytest.mark.parametrize("ids", [IDS, torch.tensor(IDS)])
def test_a_list_of_ids_is_one_window(ids):
    model, names = tiny_model(), ["1.pattern"]
    _, windows = record(model, torch.tensor([IDS]), names)
    _, one = record(model, ids, names)
    assert torch.equal(one["1.pattern"], windows["1.pattern"])


@pytest.mark.parametrize("ids", ["Dear students", [[1, 2], [3]], [0.5, 1.5], []])
def test_what_is_no_ids_is_told(ids):
    for call in (lambda: record(tiny_model(), ids, []), lambda: probe.layers(tiny_model(), ids)):
        with pytest.raises(UserError, match="ids of tokens are wanted"):
            call()


@pytest.mark.parametrize("attn", ["softmax", "sigmoid", "logit"])
def test_side_by_side_is_one_by_one(attn):
    """A tap of its own for each copy of a prompt changes that copy and no other."""
    one = prompt(attn)
    states = probe.buttons(one, every=True)
    together = probe.read(one.model, IDS, [state["tap"] for state in states], few=4)
    for state, seen in zip(states, together):
        alone, = probe.read(one.model, IDS, [state["tap"]])
        assert torch.allclose(seen["pattern"], alone["pattern"], atol=1e-5), state["label"]
        assert torch.allclose(seen["length"], alone["length"], rtol=1e-4), state["label"]


def test_the_buttons_are_the_edits_of_links():
    one = prompt()
    states = probe.buttons(one, every=True)
    found = probe.targets(one.model, torch.tensor([IDS]))
    names = ["cut neurons", "cut variance", "cut lock"] + ["forge variance"] * 11
    for i, name in enumerate(names):
        edit = next(probe.planned(name))[2]
        tap = probe.intervene(one.model, edit, *found, max(i - 2, 0), 12)
        _, kept = record(one.model, IDS, ["1.pattern"], tap)
        seen, = probe.read(one.model, IDS, [states[i + 1]["tap"]])
        assert torch.allclose(seen["pattern"][1], kept["1.pattern"][0], atol=1e-6), name


def test_neurons_are_silent_at_every_token():
    model = tiny_model()
    tap = probe.silent(model, {1: [3, 39]})
    _, kept = record(model, IDS, ["1.mlp_post"], tap)
    assert (kept["1.mlp_post"] == 0).all((0, 1)).nonzero()[:, 0].tolist() == [3, 39]


def test_words_on_the_axes():
    maps = {"a": torch.eye(3), "b": torch.eye(3)}
    figure = figures.words(maps, ["Dear", "$x", "a" * 20], [[("so", 0.5)]] * 2, "a$b")
    assert figure.get_suptitle() == r"a\$b"
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["Dear", r"\$x", "a" * 11 + "…"]
    assert "so 50%" in figure.axes[1].texts[0].get_text()
    for kind, begin in {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}.items():
        assert figures.drawn(figure, kind).startswith(begin)


# ---------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama whose 50 words are w0 to w49."""
    folder = tiny_llama_folder(tmp_path_factory.mktemp("llama") / "tiny")
    return with_tokenizer(folder, {f"w{i}": i for i in range(50)})


def test_the_command(llama, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i}" for i in IDS))
    probe.main(["--llama", str(llama), "--from", str(text), "--layer", "1", "--head", "2",
                "--silence", "0:3 0:39", "--format", "svg", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    for part in (f"reads 12 tokens: w{IDS[0]} ", "neurons 3, 39 of layer 0",
                 "next word, as it is", "left out: variances"):
        assert part in said
    saved = json.loads((tmp_path / "words.json").read_text())
    for label, neurons in {"as it is": {}, "neurons silent": {0: [3, 39]}}.items():
        state, tap = saved["states"][label], probe.silent(tiny_model(), neurons)
        logits, kept = record(tiny_model(), IDS, ["1.pattern"], tap)
        expected = probe.sink_score(kept["1.pattern"], 0)[0]
        assert np.allclose(state["sink"][1], expected, atol=1e-5)
        assert np.allclose(state["map"], kept["1.pattern"][0, 2], atol=1e-5)
        assert state["next"][0][0] == f"w{logits[0, -1].argmax()}"
    assert (tmp_path / "words.svg").exists()


def test_resting_queries_are_those_of_the_part_that_is_read(tmp_path, tiny_run):
    tiny_run(tmp_path, data="rest", bos=0.0, steps=1)
    look = probe.parse([str(tmp_path), "--text", "a" * 200])
    assert probe.open_prompt(look).queries.tolist() == [False] * 10 + [True] * 30
    look.text = "WXYZ"
    with pytest.raises(UserError, match="no query of this text rests"):
        probe.open_prompt(look)


# ---------------------------------------------------------------- page and film

def page_for(one, path):
    states = probe.buttons(one, every=True)
    shown = probe.look_at(one, states)
    content = probe.page_of(one, shown, states)
    page.write(path, content)
    return content


def test_the_numbers_of_the_page_are_those_of_probe(tmp_path):
    content = page_for(prompt(), tmp_path / "page.html")
    back = numbers_of(tmp_path / "page.html")
    assert back["words"] == content["words"]
    assert len(back["states"]) == 4 + 11
    for i, state in enumerate(content["states"]):
        assert np.abs(back["pattern"][i] - state["pattern"].numpy()).max() < 0.5 / 255 + 1e-6
        assert np.array_equal(back["length"][i], state["length"].numpy())
        assert back["states"][i]["next"] == [list(pair) for pair in state["next"]]


def test_a_page_is_never_too_large(tmp_path, monkeypatch):
    page_for(prompt(), tmp_path / "whole.html")
    monkeypatch.setattr(page, "MOST", (tmp_path / "whole.html").stat().st_size - 1)
    page_for(prompt(), tmp_path / "page.html")
    alone = [state["k"] for state in numbers_of(tmp_path / "page.html")["states"]
             if "k" in state]
    assert alone == [1, 3, 5, 7, 9, 11]


def test_a_film(tmp_path, tiny_run):
    """One picture an evaluation, the last of them the trained model."""
    state = tiny_run(tmp_path / "run", data="rest", vocab_size=17, bos=0.0)
    film = read_film(tmp_path / "run")
    assert film["step"].tolist() == [row["step"] for row in state.log]
    seen, = probe.read(state.model, film["ids"].tolist())
    assert np.abs(film["pattern"][-1] / 255 - seen["pattern"].numpy()).max() < 0.5 / 255 + 1e-6
    probe.main([str(tmp_path / "run"), "--page"])
    back = numbers_of(tmp_path / "run" / "page.html")
    steps = [s["step"] for s in back["states"] if "step" in s]
    assert steps == film["step"].tolist()


READ = """
  const said = {}, text = id => document.getElementById(id).textContent;
  const note = name => said[name] = [text("says"), text("head"), text("reading"), text("next")];
  const on = (id, kind, x, y) => {
    const canvas = document.getElementById(id), box = canvas.getBoundingClientRect();
    const at = { clientX: box.left + x(box.width), clientY: box.top + y(box.height) };
    canvas.dispatchEvent(new PointerEvent(kind, { bubbles: true, ...at }));
  };
  note("begin");
  document.querySelectorAll("#buttons button")[1].click();
  note("silent");
  document.querySelectorAll("#words button")[5].click();
  note("alone");
  on("grid", "click", w => w - 3, h => 3);
  note("corner");
  on("map", "pointermove", w => mapPlace().margin + 1, h => 11.5 * mapPlace().side);
  note("hover");
  document.getElementById("map").focus();
  dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  note("key");
  document.body.textContent = JSON.stringify(said);
"""


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    if not browser.found():
        pytest.skip("no Chromium here: the page is not clicked")
    one, path = prompt(), tmp_path / "page.html"
    content = page_for(one, path)
    dom = browser.opened(path, READ, "--dump-dom")
    said = json.loads(dom[dom.index("<body"):].split(">", 1)[1].split("</body>")[0])
    words, states = content["words"], content["states"]
    assert "5 of 40 neurons" in said["silent"][0]
    assert said["alone"][0].startswith(f"In every layer “{words[5]}” sees only itself")
    alone = next(state for state in states if state.get("k") == 5)
    for name, head in {"begin": states[0], "silent": states[1], "alone": alone}.items():
        word, p = head["next"][0]
        assert said[name][3].startswith(f"{word}{round(100 * p)}%"), name
    assert said["corner"][1].startswith("Layer 1, head 0")
    weight = alone["pattern"][1, 0, 11]
    for name, s in {"hover": 0, "key": 1}.items():
        before, _, shown = said[name][2].rpartition(" ")
        assert before == f"“{words[11]}” looks at “{words[s]}”:"
        assert abs(float(shown) - weight[s]) < 0.008, name
