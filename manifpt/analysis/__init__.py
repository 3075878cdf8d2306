"""What artifacts say of generators and of single images."""
