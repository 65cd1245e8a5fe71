"""The demo checkpoint's tokenizer: a small byte-level BPE with DeepSeek V4's special tokens and turn layout.

Trained on generated tickets and their answers, so it stands between `tickets` and `train`. Every digit is a token of
its own, because the task copies numbers and rewrites dates.
"""

# ruff: noqa: RUF001 - the bars of DeepSeek's special tokens are full-width on purpose

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moebeam.jobs.demo.tickets import SYSTEM_PROMPT, generate_tickets

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
SPECIAL_TOKENS: tuple[str, ...] = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK)

VOCAB_SIZE = 2048
_NUM_TRAINING_TICKETS = 4_000
_SEED = 7

# A word with the space before it, one digit, a run of punctuation, or white space.
_SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' -%}{{- message.content -}}"
    "{%- elif message.role == 'user' -%}{{- '<｜User｜>' + message.content -}}"
    "{%- if not loop.last or add_generation_prompt -%}"
    "{{- '<｜Assistant｜>' -}}"
    "{{- '<think>' if enable_thinking is defined and enable_thinking and loop.last else '</think>' -}}"
    "{%- endif -%}"
    "{%- elif message.role == 'assistant' -%}{{- message.content + eos_token -}}"
    "{%- else -%}{{- raise_exception('unknown role: ' + message.role) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""One Jinja line: the system text bare after the first token; `</think>` opens an answer without thinking.

A past answer never shows its reasoning, so its turn opens with `</think>` even when the last one thinks.
"""


def training_texts() -> Iterator[str]:
    """The system prompt, and prompts and answers of both the vocabulary's sources, in a fixed order."""
    yield SYSTEM_PROMPT
    for ticket in generate_tickets(_NUM_TRAINING_TICKETS, seed=_SEED, split="train"):
        yield ticket.user_text
        yield ticket.answer_json


def train_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train the BPE and wrap it as `transformers` expects.

    The special tokens get the ids 0 to 6; the vocabulary may end smaller than asked when the text has no more pairs.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(training_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render_prompt(user_text: str) -> str:
    """The prompt of one ticket as text: what `CHAT_TEMPLATE` gives for a system and a user message."""
    return f"{BOS}{SYSTEM_PROMPT}{USER}{user_text}{ASSISTANT}{END_THINK}"


def get_token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Id of one token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which holds the chat template, into `folder`."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
