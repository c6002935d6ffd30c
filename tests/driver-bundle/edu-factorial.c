// Prints the factorial of its argument, as the device computes it.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

uint32_t edu_factorial(uint32_t number);

int main(int count, char **arguments)
{
	uint32_t result = edu_factorial(count > 1 ? strtoul(arguments[1], NULL, 10) : 0);

	if (!result)
		perror("edu-factorial");
	else
		printf("%u\n", result);
	return !result;
}
