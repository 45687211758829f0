"""One process that owns one device. Only here is torch imported."""
