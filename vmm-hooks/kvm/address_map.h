/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The machine as its guest sees it: addresses, ports, and how a vCPU begins. memvm and its guest
 * both include this, so it has no other header and no function.
 *
 * Every vCPU begins in 64-bit mode with interrupts off, at the entry of the guest's ELF image:
 *   rdi  ADDRESS_BOOT_INFO
 *   rsi  the vCPU's number
 *   cr3  tables that map the first 4 GiB to themselves
 *   cs, ds, es, ss  flat; the descriptor tables are empty: the guest loads its own
 * There is no interrupt controller. What would be an interrupt elsewhere ends a HLT here: of the
 * first vCPU for a device, of any for its own timer. HLT may also end for no reason.
 */
#ifndef MEMVM_ADDRESS_MAP_H
#define MEMVM_ADDRESS_MAP_H

#define ADDRESS_PAGE_TABLES 0x1000U /* six pages: PML4, one PDPT, four PDs of 2 MiB entries */
#define ADDRESS_BOOT_INFO   0x7000U
#define ADDRESS_KERNEL      0x100000U /* at or above this the ELF image lies */
#define ADDRESS_RAM_END     0xc0000000ULL

/* Devices on virtio-mmio, in the order in which they were added. */
#define ADDRESS_VIRTIO       0xd0000000ULL
#define ADDRESS_VIRTIO_BYTES 0x200ULL

#define PORT_SERIAL 0x3f8U /* a 16550, eight ports */

/* The board's own ports; all 32 bits wide. */
#define PORT_BOARD   0x600U
#define PORT_CLOCK   0x600U /* read: microseconds, wrapping */
#define PORT_ALARM   0x604U /* write: microseconds after which this vCPU's next HLT ends */
#define PORT_GIVE_UP 0x608U /* write: the number of a page that is to be empty from now on */
#define PORT_OFF     0x60cU /* write: the machine ends, with this exit status */

#define MACHINE_MAX_CPUS 8U

#endif
