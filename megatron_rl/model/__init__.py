"""The trained model: built from a Hugging Face config, run and stepped through Megatron's own schedules.

Import after ``megatron_rl.patches.apply()``.
"""
