"""Task sets that come with agentx."""
