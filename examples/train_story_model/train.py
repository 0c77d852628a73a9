"""Train a small Llama-architecture story model on fairy tales, on CPU or GPU.

    python train.py --data DIR --size 4m --minutes 90 --out MODEL_DIR [--init MODEL_DIR]
    [--tokenizer MODEL_DIR]

DIR holds train.txt and valid.txt (see prepare_corpus.py). --init trains a checkpoint on, with its
tokenizer;
--tokenizer makes a draft with another model's vocabulary. The best state so far is saved every 500
steps.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, SYSTEM, USER, ASSISTANT, END = SPECIAL = [
    "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
]  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SIZES = {
    "4m": {
        "hidden_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512,
    },
    "1m": {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 256,
    },
}  # fmt: skip
Books = list[list[str]]
Tokens = NDArray[np.int32]


def read_books(path: Path) -> Books:
    """Paragraphs of each book."""
    blocks = path.read_text(encoding="utf-8").strip().split("\n\n")
    return [block.split("\n") for block in blocks]


def make_tokenizer(books: Books) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 4,096 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((p for book in books for p in book), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=BOS,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=2048,
    )
    fast.chat_template = TEMPLATE
    return fast


def cut(books: Books, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Tokens:
    """One cut of the text into passages and chat turns (an opening sentence, then how the tale goes
    on).
    """
    special = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    out: list[int] = []
    for book in books:
        i = 0
        while i < len(book):
            if rng.random() < 0.3:
                sentences = [s for s in re.split(r"(?<=[.!?])[\"']? ", book[i]) if s]
                count = rng.choice([1, 1, 1, 2])
                opening = " ".join(sentences[:count])
                length = rng.choice([1, 1, 2, 3])
                rest = " ".join(
                    filter(None, [" ".join(sentences[count:]), *book[i + 1 : i + length]])
                )
                if len(opening) < 300 and 80 < len(rest) < 1600:
                    out += [special[BOS], special[USER], *encode(opening), special[END]]
                    out += [special[ASSISTANT], *encode(rest), special[END]]
            else:
                length = rng.randint(3, 12)
                out += [special[BOS], *encode("\n".join(book[i : i + length]))]
                out += [special[END]] if i + length >= len(book) else []
            i += length
    return np.array(out, np.int32)


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh model of the size, or the one to train on, in float32."""
    if args.init:
        return LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=4096,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES[args.size],
    )
    return LlamaForCausalLM(config)


class Trainer:
    """AdamW with a warm-up and a cosine over the given minutes."""

    def __init__(
        self, args: argparse.Namespace, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.rng = np.random.default_rng(0)

    def batch(self, tokens: Tokens) -> torch.Tensor:
        """Random windows, [batch, seq] int64."""
        starts = self.rng.integers(0, len(tokens) - self.args.seq - 1, self.args.batch)
        windows = np.stack([tokens[s : s + self.args.seq] for s in starts])
        return torch.from_numpy(windows.astype(np.int64)).to(self.device)

    def train(self, cuts: list[Tokens], held_out: Tokens) -> None:
        """Until the minutes are over."""
        begin, step, share = time.monotonic(), 0, 0.0
        while share < 1:
            rate = self.args.lr * min(1, (step + 1) / 100)
            rate *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            batch = self.batch(cuts[int(share * 9) % len(cuts)])
            loss = self.model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            step += 1
            share = (time.monotonic() - begin) / (60 * self.args.minutes)
            if step % 50 == 0:
                print(f"{step} steps, {share:.0%}, loss {loss.item():.3f}", flush=True)
            if step % 500 == 0 or share >= 1:
                print(f"held-out loss {self.evaluate(held_out):.4f}", flush=True)
                self.save()

    @torch.no_grad()
    def evaluate(self, tokens: Tokens) -> float:
        """Nats per token on up to 60 windows of the held-out text."""
        self.model.eval()
        losses = []
        seq = min(self.args.seq, len(tokens) - 1)
        for i in range(0, min(len(tokens) - seq, 60 * seq), seq):
            window = torch.from_numpy(tokens[i : i + seq].astype(np.int64))[None].to(self.device)
            losses.append(self.model(input_ids=window, labels=window).loss.item())
        self.model.train()
        return sum(losses) / len(losses)

    def save(self) -> None:
        """bfloat16 weights, config and tokenizer."""
        copy = LlamaForCausalLM(self.model.config)
        copy.load_state_dict(self.model.state_dict())
        copy.to(torch.bfloat16).save_pretrained(self.args.out)
        self.tokenizer.save_pretrained(self.args.out)


def main() -> None:
    """Tokenizer, cuts of the text, training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="4m")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--init")
    parser.add_argument("--tokenizer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-3, help="1.5e-3 with --init")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    books = read_books(args.data / "train.txt")
    known = args.init or args.tokenizer
    tokenizer = PreTrainedTokenizerFast.from_pretrained(known) if known else make_tokenizer(books)
    rng = random.Random(0)
    cuts = [cut(books, tokenizer, rng) for _ in range(3)]
    held_out = cut(read_books(args.data / "valid.txt"), tokenizer, random.Random(1))
    print(f"{[len(c) for c in cuts]} tokens to train on, {len(held_out)} held out", flush=True)
    Trainer(args, make_model(args, tokenizer), tokenizer).train(cuts, held_out)


if __name__ == "__main__":
    main()
