// The user-space library of the suite's stand-in for an accelerator: asks the device for a factorial. 0: it cannot.
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>

uint32_t edu_factorial(uint32_t number)
{
	uint32_t result = 0;
	int device = open("/dev/edu0", O_RDWR | O_CLOEXEC);

	if (device < 0)
		return 0;
	if (write(device, &number, sizeof(number)) != sizeof(number) || read(device, &result, sizeof(result)) != sizeof(result))
		result = 0;
	close(device);
	return result;
}
