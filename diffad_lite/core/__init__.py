"""What every room needs: configurations, files, interrupts. No torch, no room above."""

from diffad_lite.core.config import changed_fields, with_values

__all__ = ["changed_fields", "with_values"]
