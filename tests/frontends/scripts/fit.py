"""sentence-transformers' older way: ``fit`` makes a Trainer of its own."""

import sys

from sentence_transformers import InputExample, SentenceTransformer, losses
from torch.utils.data import DataLoader
from transformers import set_seed

set_seed(1)
model = SentenceTransformer("tiny-bert", device="cpu")
words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "fast", "slow"]
examples = [
    InputExample(texts=[" ".join(words[i % 7 :][:4]), " ".join(words[i % 5 :][:4])], label=float(i % 3) / 2) for i in range(48)
]
loader = DataLoader(examples, shuffle=True, batch_size=4)
model.fit(
    train_objectives=[(loader, losses.CosineSimilarityLoss(model))],
    epochs=2,
    warmup_steps=4,
    optimizer_params={"lr": 1e-3},
    checkpoint_path=f"{sys.argv[1]}/checkpoints",
    checkpoint_save_steps=5,
    show_progress_bar=False,
)
model.save(sys.argv[1])
