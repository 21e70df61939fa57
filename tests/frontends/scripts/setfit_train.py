"""SetFit: it trains an embedding with a Trainer, and then fits a classifier."""

import sys

from datasets import Dataset
from setfit import SetFitModel, Trainer, TrainingArguments

words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "fast", "slow"]
rows = [{"text": " ".join(words[i % 9 :][:5]), "label": i % 2} for i in range(12)]
model = SetFitModel.from_pretrained("tiny-bert", device="cpu")
arguments = TrainingArguments(
    output_dir=f"{sys.argv[1]}/checkpoints",
    batch_size=4,
    num_epochs=1,
    num_iterations=4,
    save_strategy="steps",
    save_steps=5,
    report_to="none",
    body_learning_rate=1e-3,
)
Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows)).train()
model.save_pretrained(sys.argv[1])
