"""Options that several commands share."""

import click

device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: CUDA if there is a GPU.",
)

batch_size_option = click.option(
    "--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Images embedded per batch."
)
