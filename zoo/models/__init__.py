"""Models, caches and attention. These files travel with checkpoints: they import only torch."""
