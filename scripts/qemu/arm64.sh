# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034,SC2054,SC2100
#
# The arm64 test machine: virt with EL2 (KVM runs in VHE mode), GICv3 and ITS.
qemu=qemu-system-aarch64
qemu_machine=(-M virt,virtualization=on,gic-version=3 -cpu max,pauth-impdef=on)
console=ttyAMA0
append=
kernel_make=(ARCH=arm64 CROSS_COMPILE=aarch64-linux-gnu-)
kernel_cc=aarch64-linux-gnu-gcc
kernel_image=arch/arm64/boot/Image
