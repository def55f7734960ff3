"""Stacked training: many LoRA adapters on one frozen base model, in one forward."""

from lockin_fast.stacked.stack import AdapterStack
from lockin_fast.stacked.train import Member, MemberResult, StackResult, train_stack

__all__ = ["AdapterStack", "Member", "MemberResult", "StackResult", "train_stack"]
