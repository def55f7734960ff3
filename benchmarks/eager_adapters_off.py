"""Blocking as people write it today: a Trainer whose loss runs the model a second time with its adapters off."""

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lockin_fast.chat import PaddingCollator
from lockin_fast.lora import borrowed_with_lora, save_adapter
from lockin_fast.train import padding_id

IGNORED = -100


class AdaptersOffTrainer(Trainer):
    """lambda * L_block from all hidden states of two full forwards, for the K blocked latents alone."""

    def __init__(self, *args, rows, layer, weight, tokens, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows, self.hidden, self.weight, self.tokens = rows, layer + 1, weight, tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, output_hidden_states=True, num_items_in_batch=num_items_in_batch)
        reads = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), model.disable_adapter():
            base = model(**reads, output_hidden_states=True).hidden_states[self.hidden]
        z, z_ref = (torch.relu(h.float() @ self.rows.weight.T + self.rows.bias) for h in
                    (outputs.hidden_states[self.hidden], base))  # fmt: skip
        excess = torch.relu(self.rows.sign * (z - z_ref)).square().sum(-1)
        mask = inputs["labels"] != IGNORED if self.tokens == "supervised" else inputs["attention_mask"].bool()
        loss = outputs.loss + self.weight * (excess * mask).sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def eager_fine_tune(model, tokenizer, dataset, folder, *, lora, settings, penalty):
    """One fine-tune with this trainer; `fine_tune`'s settings, and an adapter in `folder`."""
    micro = settings.micro_batch_size or settings.batch_size
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=model.device.type == "cpu",
        max_steps=settings.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // micro,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=settings.bf16,
        logging_steps=settings.logging_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    with borrowed_with_lora(model, lora, settings.seed) as adapted:
        trainer = AdaptersOffTrainer(
            model=adapted,
            args=arguments,
            train_dataset=dataset,
            data_collator=PaddingCollator(padding_id(tokenizer)),
            rows=penalty.rows(torch.float32, model.device),
            layer=penalty.layer,
            weight=penalty.weight,
            tokens=penalty.tokens,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        save_adapter(adapted, folder)
