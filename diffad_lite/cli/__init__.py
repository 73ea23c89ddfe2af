"""The command ``diffad``; nothing here imports torch before work starts."""
