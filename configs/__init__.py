"""The shipped configs; `msf-faiss pretrain NAME` finds NAME.yaml here."""
