"""What an operation, a layer or the gradient buffer costs, beside PEFT and plain torch."""
