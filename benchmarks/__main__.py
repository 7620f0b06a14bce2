"""`just bench`: every measurement that takes no trained run, one after the other."""

from benchmarks import (
    bypass,
    checkpoints,
    comparison,
    fsdp,
    joint,
    joint_block,
    loop,
    mouth_loss,
    plan,
    reading,
    resume,
    resume_position,
    tracking,
)

if __name__ == "__main__":
    reading.main([])
    resume_position.main([])
    resume.main([])
    checkpoints.main([])
    tracking.main([])
    comparison.main([])
    loop.main([])
    joint_block.main([])
    joint.main([])
    mouth_loss.main()
    bypass.main([])
    fsdp.main([])
    plan.main([])
