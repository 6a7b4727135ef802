"""Ids and text against transformers' own CLIPTokenizer and BertTokenizer."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import BertTokenizer, CLIPTokenizer

from dnp.engine.bundle.manifest import TextSpec, TokenizerSpec
from dnp.engine.errors import BundleError, SettingsError
from dnp.export.families.blip import BlipParts, caption_tokenizer
from dnp.runtime.tokenizer import MAX_CHARACTERS, CaptionTokenizer, PromptTokenizer

LENGTH = 16
WORDS = ["a", "the", "red", "circle", "square", "left", "of", "on", "it", "'s", "isn't", "don't", "1024"]

# One piece of each kind that has surprised a tokenizer; strings are random runs of them.
PIECES = [
    *WORDS, "RED", "Straße", "ﬁne", "İstanbul", "ǅ", "naïve", "nai\u0308ve", "e\u0301", "\u0301", "ĳ", "Ω", "K", "½",
    "①", "画像", "赤い丸", "빨간", "가", "한", "ไทย", "שלום", "مرحبا", "नमस्ते", "\u200d", "\u200c", "\u200b", "\ufeff",
    "\u202e", "\u2066", "🙂", "👩\u200d👩\u200d👧", "🇫🇷", "👍🏽", "❤️", "𝔘𝔫𝔦", "𐍈", "\U0010ffff", "\ue000", "\ufffd",
    "\t", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2003", "\u2028", "\u3000", "\u1680", "   ", " ", " ",
    "\x01", "\x1b[31m", "\x7f", "\xad", "...", "?!", ",", ".", "'", "''", "'S", "’s", '"', "-", "--", "(", ")", "_",
    "#", "##ing", "</w>", "<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "[SEP]", "[MASK]", "[sep]", "<b>",
    "&amp;", "\\n", "0", "3.14", "٣",
]  # fmt: skip


def corpus(count):
    rng = random.Random(7)
    mixed = ["".join(rng.choices(PIECES, k=rng.randint(1, 40))) for _ in range(count // 2)]
    words = [" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(count // 4)]
    points = ["".join(map(chr, rng.choices(range(1, 0xD800), k=rng.randint(1, 20)))) for _ in range(count // 4)]
    return ["", " ", *PIECES, *mixed, *words, *points, "a" * 5000, "red " * 5000, "🙂" * 3000, "\u0301" * 3000]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """transformers' tokenizer and ours, over the same byte-level vocabulary with a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges = []
    for word in WORDS:
        head, *rest = [*word[:-1], word[-1] + "</w>"]
        for piece in rest:
            merges.append((head, piece))
            head += piece
            tokens.append(head)
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    vocab = {token: i for i, token in enumerate(tokens)}
    folder = tmp_path_factory.mktemp("clip")
    CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=LENGTH).save_pretrained(folder)
    reference = CLIPTokenizer.from_pretrained(folder)
    (folder / "prompt.json").write_text(reference.backend_tokenizer.to_str(), encoding="utf-8")
    bos, eos = reference.bos_token_id, reference.eos_token_id
    text = TextSpec(LENGTH, (TokenizerSpec("prompt.json", bos, eos, reference.pad_token_id),), "encoded")
    return reference, PromptTokenizer(SimpleNamespace(path=folder, text=text))


@pytest.fixture(scope="module", params=[False, True], ids=["as decoded", "spaces cleaned up"])
def bert(request, tmp_path_factory):
    """transformers' tokenizer and ours; BLIP's own folders ask for the clean-up of spaces."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'-#"
    vocab = [
        *specials,
        *letters,
        *(f"##{c}" for c in letters),
        "the",
        "red",
        "circle",
        "do",
        "##n",
        "ve",
        "re",
        "##s",
        "n",
        "'s",
    ]
    folder = tmp_path_factory.mktemp("bert")
    BertTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(vocab))}, clean_up_tokenization_spaces=request.param
    ).save_pretrained(folder)
    reference = BertTokenizer.from_pretrained(folder)
    caption_tokenizer(BlipParts(None, reference, [], [])).save(str(folder / "caption.json"))
    bundle = SimpleNamespace(path=folder, caption=SimpleNamespace(tokenizer="caption.json"))
    return reference, CaptionTokenizer(bundle)


def clip_ids(reference, prompts):
    return reference(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np").input_ids


def test_prompt_ids_equal_transformers(clip):
    reference, tokenizer = clip
    prompts = corpus(4000)
    ids = tokenizer.encode(prompts)
    assert ids.dtype == np.int64
    assert ids.shape == (len(prompts), LENGTH)
    np.testing.assert_array_equal(ids, clip_ids(reference, prompts))


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60))
@example("")
def test_any_prompt_has_transformers_ids(clip, prompt):
    reference, tokenizer = clip
    np.testing.assert_array_equal(tokenizer.encode([prompt]), clip_ids(reference, [prompt]))


def test_prompt_decoding_equals_transformers(clip):
    reference, tokenizer = clip
    prompts = corpus(400)
    for row in tokenizer.encode(prompts):
        assert tokenizer.decode(row) == reference.decode(row, skip_special_tokens=True)
    assert tokenizer.decode(tokenizer.encode(["The RED  circle"])[0]) == "the red circle"


def test_what_was_cut_off_is_told(clip):
    _, tokenizer = clip
    kept, lost = "the red circle left of the red square on the red circle on ", "the RED square, isn't it"
    assert tokenizer.truncated(kept) is None
    assert tokenizer.truncated(kept + "the") is None
    assert tokenizer.truncated(kept + "the " + lost) == lost
    np.testing.assert_array_equal(tokenizer.encode([kept + "the " + lost]), tokenizer.encode([kept + "the"]))


def test_cut_off_text_after_marks_that_normalisation_joins(clip):
    _, tokenizer = clip
    prompt = "e\u0301 " * 6 + "red square"  # é takes two tokens, so fourteen are three more than the six leave
    assert tokenizer.truncated(prompt) is None
    assert tokenizer.truncated(prompt + " circle") == "circle"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [("\ud800 half", "UTF-8"), ("a\0b", "NUL"), (None, "NoneType"), (b"\x89PNG\x00", "bytes"), (3, "int"),
     ("x" * (MAX_CHARACTERS + 1), "100001 characters"), ("x" * 10_000_000, "10000000 characters")],
    ids=["surrogate", "NUL", "none", "bytes", "number", "long", "huge"],
)  # fmt: skip
def test_what_is_not_text_is_refused(clip, bert, prompt, reason):
    for refuse in (lambda: clip[1].encode([prompt]), lambda: clip[1].truncated(prompt), lambda: bert[1].encode(prompt)):
        with pytest.raises(SettingsError, match=reason) as caught:
            refuse()
        assert len(str(caught.value)) < 200


def test_one_prompt_is_no_list_of_prompts(clip):
    with pytest.raises(SettingsError, match="list of prompts"):
        clip[1].encode("red")


def test_no_prompts_give_no_ids(clip):
    assert clip[1].encode([]).shape == (0, LENGTH)


@pytest.mark.parametrize("prompt", ["a" * MAX_CHARACTERS, "🙂" * MAX_CHARACTERS, "a " * (MAX_CHARACTERS // 2)])
def test_the_longest_prompts_have_transformers_ids(clip, prompt):
    reference, tokenizer = clip
    np.testing.assert_array_equal(tokenizer.encode([prompt]), clip_ids(reference, [prompt]))


def test_prefix_ids_equal_transformers(bert):
    reference, tokenizer = bert
    for text in corpus(2000):
        assert tokenizer.encode(text) == reference(text, add_special_tokens=False).input_ids


def test_caption_decoding_equals_transformers(bert):
    reference, tokenizer = bert
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, len(reference), rng.integers(0, 30)).tolist() for _ in range(2000)]
    rows += [reference(text).input_ids for text in corpus(400)]
    rows += [
        reference(text).input_ids for text in ("it's the red . circle , do n't ! ' a ' ve ' re ?", "a ' s", "don't 've")
    ]
    for row in rows:
        assert tokenizer.decode(row) == reference.decode(row, skip_special_tokens=True)


def test_ids_beyond_the_vocabulary_are_left_out(bert):
    reference, tokenizer = bert
    row = [len(reference) + 5, *reference("the red circle").input_ids]
    assert tokenizer.decode(row) == "the red circle"


def test_a_long_prompt_fills_several_windows(clip):
    reference, tokenizer = clip
    prompt = " ".join(["a", "cat", "red"] * 12)
    ids = reference(prompt, add_special_tokens=False).input_ids
    rows = tokenizer.encode([prompt, "a"], 3).reshape(2, 3, LENGTH)
    bos, eos = reference.bos_token_id, reference.eos_token_id
    room = LENGTH - 2
    for number, window in enumerate(rows[0]):
        part = [bos, *ids[number * room : (number + 1) * room], eos]
        assert window.tolist() == part + [reference.pad_token_id] * (LENGTH - len(part))
    np.testing.assert_array_equal(rows[1, 1:], [tokenizer.encode([""])[0]] * 2)
    assert tokenizer.truncated(prompt, 99) is None
    lost = tokenizer.truncated(prompt, 2)
    assert prompt.endswith(lost) and reference(lost, add_special_tokens=False).input_ids == ids[2 * room :]


def test_a_tokenizer_that_does_not_fit_the_model_is_a_bundle_error(clip, tmp_path):
    reference, _ = clip
    (tmp_path / "prompt.json").write_text(reference.backend_tokenizer.to_str(), encoding="utf-8")
    text = TextSpec(LENGTH, (TokenizerSpec("prompt.json", 3, 4, 0),), "encoded")
    with pytest.raises(BundleError, match=r"empty prompt.*\[3, 4\]"):
        PromptTokenizer(SimpleNamespace(path=tmp_path, text=text))


def test_a_broken_tokenizer_file_is_a_bundle_error(tmp_path):
    (tmp_path / "prompt.json").write_text("{}")
    bundle = SimpleNamespace(path=tmp_path, text=TextSpec(4, (TokenizerSpec("prompt.json", 3, 4, 0),), "encoded"))
    with pytest.raises(BundleError, match=r"prompt\.json"):
        PromptTokenizer(bundle)
