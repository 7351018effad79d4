"""The parts of the step `promote`: evidence, the gate and its report, what a version keeps, going back."""
