"""The cloud side: Kafka into the lake (`intake`, `lake`), the engine (`analysis`), clients (`feed`)."""
