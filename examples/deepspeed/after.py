"""Train a model of Hugging Face on text with DeepSpeed."""

import argparse
from pathlib import Path

import torch

import autosp_aot


class Text(torch.utils.data.Dataset):
    """A file as windows one after the other, a token a byte."""

    def __init__(self, path: str, length: int):
        tokens = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8).long()
        self.windows = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[at], "labels": self.windows[at]}


parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="folder of the weights to begin with")
parser.add_argument("--data", required=True, help="text file")
parser.add_argument("--out", required=True, help="folder for the weights at the end")
parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--config", default=str(Path(__file__).with_name("ds.json")))
parser.add_argument("--local_rank", type=int, help="what deepspeed's launcher adds")
args = parser.parse_args()

data = Text(args.data, args.length)
engine = autosp_aot.initialize(f"{args.model}.sp2", args.config, init_from=args.model, training_data=data)

engine.train()
for step, batch in zip(range(args.steps), engine.training_dataloader):
    batch = {name: tensor.to(engine.device) for name, tensor in batch.items()}
    loss = engine(**batch)
    engine.backward(loss)
    engine.step()
    if engine.global_rank == 0:
        print(f"step {step + 1} loss {loss.item():.6f}", flush=True)

if engine.global_rank == 0:
    engine.module.save_pretrained(args.out)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
