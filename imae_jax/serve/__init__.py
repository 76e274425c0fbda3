"""An OpenAI-compatible endpoint over `LanguageModel`, for research and comparison."""
