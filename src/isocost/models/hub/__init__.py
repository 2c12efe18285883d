"""Checkpoints that people have: folders of diffusers' text-to-image pipelines, one adapter a kind."""
