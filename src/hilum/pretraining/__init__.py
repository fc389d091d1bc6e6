"""DINOv2 self-supervised pretraining and nothing else: views, masks, teacher and student, losses, schedules."""
