// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0
// A driver for QEMU's `edu` device (1234:11e8), the suite's stand-in for an accelerator: it wants firmware, has a parameter,
// interrupts by MSI and makes a node, /dev/edu0. What is written to the node as four bytes is read back as its factorial.
#include <linux/completion.h>
#include <linux/firmware.h>
#include <linux/interrupt.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/uaccess.h>

#define EDU_ID 0x00
#define EDU_FACTORIAL 0x08
#define EDU_STATUS 0x20
#define EDU_STATUS_INTERRUPT 0x80
#define EDU_INTERRUPT 0x24
#define EDU_ACKNOWLEDGE 0x64

static char *mode = "none";
module_param(mode, charp, 0444);

struct edu {
	void __iomem *registers;
	struct completion done;
	struct mutex lock;
	struct miscdevice node;
	u32 result;
};

static struct edu *of(struct file *file)
{
	return container_of(file->private_data, struct edu, node);
}

static irqreturn_t edu_interrupt(int irq, void *data)
{
	struct edu *edu = data;
	u32 status = readl(edu->registers + EDU_INTERRUPT);

	if (!status)
		return IRQ_NONE;
	writel(status, edu->registers + EDU_ACKNOWLEDGE);
	complete(&edu->done);
	return IRQ_HANDLED;
}

static ssize_t edu_write(struct file *file, const char __user *from, size_t length, loff_t *at)
{
	struct edu *edu = of(file);
	ssize_t outcome = sizeof(u32);
	u32 number;

	if (length != sizeof(number))
		return -EINVAL;
	if (copy_from_user(&number, from, sizeof(number)))
		return -EFAULT;
	if (mutex_lock_interruptible(&edu->lock))
		return -ERESTARTSYS;
	reinit_completion(&edu->done);
	writel(EDU_STATUS_INTERRUPT, edu->registers + EDU_STATUS);
	writel(number, edu->registers + EDU_FACTORIAL);
	if (wait_for_completion_timeout(&edu->done, 60 * HZ))
		edu->result = readl(edu->registers + EDU_FACTORIAL);
	else
		outcome = -ETIMEDOUT;
	mutex_unlock(&edu->lock);
	return outcome;
}

static ssize_t edu_read(struct file *file, char __user *to, size_t length, loff_t *at)
{
	u32 number = READ_ONCE(of(file)->result);

	if (length != sizeof(number))
		return -EINVAL;
	return copy_to_user(to, &number, sizeof(number)) ? -EFAULT : sizeof(number);
}

static const struct file_operations edu_operations = {
	.owner = THIS_MODULE,
	.read = edu_read,
	.write = edu_write,
};

static int edu_probe(struct pci_dev *device, const struct pci_device_id *id)
{
	const struct firmware *firmware;
	struct edu *edu;
	int error;

	error = request_firmware(&firmware, "brig/edu.fw", &device->dev);
	if (error)
		return error;
	dev_info(&device->dev, "%zu bytes of firmware, mode %s\n", firmware->size, mode);
	release_firmware(firmware);

	edu = devm_kzalloc(&device->dev, sizeof(*edu), GFP_KERNEL);
	if (!edu)
		return -ENOMEM;
	init_completion(&edu->done);
	mutex_init(&edu->lock);
	error = pcim_enable_device(device);
	if (error)
		return error;
	error = pcim_iomap_regions(device, BIT(0), "brig_edu");
	if (error)
		return error;
	edu->registers = pcim_iomap_table(device)[0];
	if ((readl(edu->registers + EDU_ID) & 0xffff) != 0x00ed)
		return -ENODEV;
	pci_set_master(device);
	error = pci_alloc_irq_vectors(device, 1, 1, PCI_IRQ_MSI);
	if (error < 0)
		return error;
	error = request_irq(pci_irq_vector(device, 0), edu_interrupt, 0, "brig_edu", edu);
	if (error)
		goto vectors;
	edu->node.minor = MISC_DYNAMIC_MINOR;
	edu->node.name = "edu0";
	edu->node.fops = &edu_operations;
	edu->node.parent = &device->dev;
	pci_set_drvdata(device, edu);
	error = misc_register(&edu->node);
	if (!error)
		return 0;
	free_irq(pci_irq_vector(device, 0), edu);
vectors:
	pci_free_irq_vectors(device);
	return error;
}

static void edu_remove(struct pci_dev *device)
{
	struct edu *edu = pci_get_drvdata(device);

	misc_deregister(&edu->node);
	free_irq(pci_irq_vector(device, 0), edu);
	pci_free_irq_vectors(device);
}

static const struct pci_device_id edu_ids[] = { { PCI_DEVICE(0x1234, 0x11e8) }, {} };
MODULE_DEVICE_TABLE(pci, edu_ids);

static struct pci_driver edu_driver = {
	.name = "brig_edu",
	.id_table = edu_ids,
	.probe = edu_probe,
	.remove = edu_remove,
};
module_pci_driver(edu_driver);

MODULE_DESCRIPTION("QEMU's edu device, for Brig's suite");
MODULE_FIRMWARE("brig/edu.fw");
MODULE_LICENSE("GPL");
